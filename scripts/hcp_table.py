"""What becomes of HCP-Diffusion's own example files, as the table of docs/hcp-diffusion.md.

    python scripts/hcp_table.py FOLDER

FOLDER holds HCP-Diffusion's `cfgs`. Each file is loaded as it stands, over its own bases; given are
only paths that it lacks. The table in the page is replaced.
"""

import contextlib
import re
import sys
from pathlib import Path

from jaxft import config
from jaxft.errors import UserError
from jaxft.explain import kind_of

PAGE = Path(__file__).parent.parent / "docs" / "hcp-diffusion.md"
HEAD = "| file | loads | left out, replaced or refused |\n|---|---|---|\n"

PATHS = {
    "train": ["model.pretrained_model_name_or_path=model", "data.dataset1.source.s.img_root=imgs"],
    "infer": ["pretrained_model=model"],
}
BASES = (
    "infer/text2img.yaml",
    "train/train_base.yaml",
    "train/tuning_base.yaml",
    "train/dataset/base_dataset.yaml",
)
"""Files that others inherit: what there is to say of them is not said of each file again."""

NAMES = re.compile(r"(?<=^data\.)\w+|(?<=\.source\.)\w+|(?<=^merge\.)\w+(?=\.)|(?<=\.)\d+")
"""In a key, what users call their datasets, sources and groups."""


def table(folder: Path) -> str:
    """A row for each file: whether it loads, and what is left out, replaced or refused."""
    with contextlib.chdir(folder):
        root = Path("cfgs")
        names = [str(path.relative_to(root)) for path in sorted(root.rglob("*.yaml"))]
        found = {name: outcome(name) for name in names if not name.startswith("workflow/")}
    common = {line for base in BASES for line in found[base][1]}
    rows = [HEAD]
    for name, (loads, told) in found.items():
        own = told if name in BASES else [line for line in told if line not in common]
        text = "; ".join(f"`{key}`: {text}" for key, text in own)
        rows.append(f"| `{name}` | {'yes' if loads else 'no'} | {text} |\n")
    return "".join(rows)


def outcome(name: str) -> tuple[bool, list[tuple[str, str]]]:
    """Whether a file loads, and the key and text of its notices, or of why it does not."""
    kind = "infer" if name.startswith("infer/") else kind_of(f"cfgs/{name}")
    try:
        _, notices = config.load(f"cfgs/{name}", PATHS[kind], kind)
    except UserError as error:
        return False, _told(str(error).splitlines())
    return True, _told(notices)


def replaced(page: str, rows: str) -> str:
    """The page with another table."""
    before, _, rest = page.partition(HEAD)
    return before + rows + rest[rest.index("\n## ") :]


def _told(lines: list[str]) -> list[tuple[str, str]]:
    """Key and text of messages, each once, however the user's datasets and groups are called."""
    parts = [line.split(": ", 2) for line in lines]
    return list(dict.fromkeys((NAMES.sub("*", key), text) for _, key, text in parts))


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text("utf-8"), table(Path(sys.argv[1]))), "utf-8")
