"""Generates images; the same program as `python -m jaxft.sample`."""

from jaxft.cli import run
from jaxft.sample import main

if __name__ == "__main__":
    run(main)
