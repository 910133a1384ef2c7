"""Python's garbage collector, kept out of the way of steps and of tracing."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """What exists now is not searched for garbage meanwhile.

    A step makes thousands of small objects, an array for each weight, and so has the collector go
    through all others, again and again: without this a third of the host's work for a step.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Nothing is searched meanwhile: tracing a program makes millions of objects, few in cycles."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
