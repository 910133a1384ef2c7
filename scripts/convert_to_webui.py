"""A diffusers folder as one file for webuis: `python -m jaxft.convert to-webui`, same flags."""

from jaxft.cli import run
from jaxft.convert import main

if __name__ == "__main__":
    run(lambda argv: main(["to-webui", *argv]))
