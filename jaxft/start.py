"""Copies the configurations and prompt templates that come with jaxft into a folder."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from jaxft import cli
from jaxft.config import shipped_folder
from jaxft.errors import UserError

TEMPLATES = "prompt_tuning_template"
"""Beside `configs/` where users have it, inside it where it comes from."""

NEXT = """\
next, {where}with images and captions of your own:
  jaxft config configs/train/examples/fine-tuning.yaml          what it says, and from which file
  jaxft plan  --config configs/train/examples/fine-tuning.yaml  what it would train
  jaxft train --config configs/train/examples/demo.yaml         a first run; needs no download"""


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code. Raises UserError for the user's mistakes."""
    parser = argparse.ArgumentParser("jaxft init", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", default=".", type=Path, help="where; else here")
    args = parser.parse_args(argv)
    copied, kept = copy(args.folder)
    print(f"{args.folder}: {copied} files copied")
    for path in kept:
        print(f"kept as it is, though it differs from jaxft's: {path}")
    print(NEXT.format(where="" if args.folder == Path(".") else f"in {args.folder}, "))
    return 0


def copy(folder: Path) -> tuple[int, list[Path]]:
    """Copies what is not there; a file that is there is never touched.

    Returns how many files were copied, and those there that differ from jaxft's.

    Raises:
        UserError: a folder or file cannot be written.
    """
    shipped = shipped_folder()
    copied, kept = 0, []
    for source in sorted(path for path in shipped.rglob("*") if path.is_file()):
        within = source.relative_to(shipped)
        target = folder / within if within.parts[0] == TEMPLATES else folder / "configs" / within
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(target):
                if not target.is_file() or target.read_bytes() != source.read_bytes():
                    kept.append(target)
                continue
            with target.open("xb") as file:
                file.write(source.read_bytes())
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
        copied += 1
    return copied, kept


if __name__ == "__main__":
    cli.run(main)
