"""`builtin:NAME`: what comes with jaxft."""

from pathlib import Path

from jaxft.errors import UserError

PREFIX = "builtin:"

FOLDERS = {"demo": "demo/model", "demo/subject": "demo/subject", "demo/class": "demo/class"}
"""Name -> folder beside this file."""


def resolve(name_or_path: str | Path) -> Path:
    """The folder of `builtin:NAME`; any other path as it stands.

    Raises:
        UserError: nothing of this name comes with jaxft.
    """
    text = str(name_or_path)
    if not text.startswith(PREFIX):
        return Path(name_or_path)
    folder = FOLDERS.get(text.removeprefix(PREFIX).rstrip("/"))
    if folder is None:
        known = ", ".join(PREFIX + name for name in FOLDERS)
        raise UserError(f"{text}: nothing of this name comes with jaxft; there are {known}")
    return Path(__file__).parent / folder
