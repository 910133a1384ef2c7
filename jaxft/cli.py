"""The command `jaxft`, and how every program of it ends."""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from jaxft import huge_pages
from jaxft.errors import UserError

PROGRAMS = {
    "train": "fine-tune a model",
    "plan": "show what a training run would do",
    "sample": "generate images",
    "convert": "convert between diffusers folders and webui files",
    "config": "show a configuration, and where each value comes from",
    "init": "copy the configurations that come with jaxft into a folder",
}

MODULES = {"plan": "planning", "config": "explain", "init": "start"}
"""Program -> its module, where that has another name."""

COMPUTING = ("train", "sample")


def program(name: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a program."""
    return importlib.import_module(f"jaxft.{MODULES.get(name, name)}").main


def run(program: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a program and exits with its code.

    A `UserError` is printed without a traceback and the code is 2; Ctrl-C makes it 130.
    """
    try:
        code = program(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def main() -> NoReturn:
    """`jaxft PROGRAM …`: the same as `python -m jaxft.PROGRAM …`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMPUTING:
        huge_pages.ask()
    if name in PROGRAMS:
        run(program(name), sys.argv[2:])
    print("usage: jaxft PROGRAM …\n")
    print("\n".join(f"  {program:8} {what}" for program, what in PROGRAMS.items()))
    sys.exit(0 if name in ("-h", "--help") else 2)


if __name__ == "__main__":
    main()
