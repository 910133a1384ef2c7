"""The program that shows what a training run would do: its plan, and what its steps will take.

python -m jaxft.plan --config configs/train/ft1.yaml [--html FILE] [key=value …]
"""

from collections.abc import Sequence
from pathlib import Path

from jaxft import config as configs
from jaxft import forecast, gallery, report
from jaxft import plan as plans
from jaxft.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Prints the plan, and writes it as a page."""
    args = plans.parse(
        argv, lambda parser: parser.add_argument("--html", type=Path, help="page to write")
    )
    if not args.config:
        raise UserError("name a configuration: --config FILE")
    if args.html and (args.html.is_dir() or not args.html.parent.is_dir()):
        raise UserError(f"--html: {args.html} is a folder, or lies in none: name a file")
    plan = plans.prepare(*configs.load(args.config, args.overrides))
    text = f"{plans.describe(plan)}\n{forecast.told(plan)}"
    print(text)
    if args.html:
        gallery.write_text(args.html, report.page(f"Plan of {args.config}", text, plan.datasets))
    return 0
