"""A configuration as the programs read it, and where each value comes from."""

import argparse
from collections.abc import Sequence

from jaxft import cli, config, origins
from jaxft.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code. Raises UserError for the user's mistakes."""
    parser = argparse.ArgumentParser("jaxft config", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", metavar="FILE key=value", help="file and overrides")
    parser.add_argument("--config", "--cfg", help="FILE, as the other programs have it")
    parser.add_argument(
        "--schema", choices=config.REFERENCES, help="what FILE is for; else told from its keys"
    )
    args = parser.parse_intermixed_args(argv)
    path, *overrides = [*([args.config] if args.config else []), *args.words, None]
    if path is None:
        raise UserError("name a configuration: jaxft config FILE")
    print(explain(path, overrides[:-1], args.schema), end="")
    return 0


def explain(path: str, overrides: Sequence[str] = (), schema: str | None = None) -> str:
    """The configuration as YAML, which gives it again when loaded, with what there is to tell
    about it at the top and, behind each value, the file and line, the command line or the default
    that it is from.

    Args:
        schema: as of `config.read`; None: told from the file.

    Raises:
        UserError: as `config.read`; or the file may be of either schema.
    """
    schema = schema or kind_of(path)
    loaded = config.read(path, overrides, schema)
    name = config.REFERENCES[schema]
    origin = origins.Origins(
        loaded.layers,
        loaded.merged,
        config.read_reference(schema),
        (config.shipped_folder() / name, f"configs/{name}"),
    )
    notices = "".join(f"# {notice}\n" for notice in loaded.notices)
    return notices + origins.annotate(config.to_yaml(loaded.config), origin)


def kind_of(path: str) -> str:
    """Which schema a file is of: the one that has more of its keys.

    Raises:
        UserError: both have as many.
    """
    keys = config.top_keys(path)
    known = {
        kind: len(keys & config.read_reference(kind).tree.keys()) for kind in config.REFERENCES
    }
    best = max(known, key=lambda kind: known[kind])
    if list(known.values()).count(known[best]) > 1:
        raise UserError(
            f"{path}: its keys do not tell what it is for; say --schema {' or '.join(known)}"
        )
    return best


if __name__ == "__main__":
    cli.run(main)
