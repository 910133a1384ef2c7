"""JAX's cache of compiled programs, kept from one run to the next."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.monitoring

SHORTEST = 0.5
"""Seconds of compilation from which on a program is kept."""


FOUND = "/jax/compilation_cache/cache_hits"
"""What JAX tells its listeners for every program that it finds."""


@contextlib.contextmanager
def found() -> Iterator[list[str]]:
    """A list that has an entry for every program that was found in the cache meanwhile."""
    told: list[str] = []

    def listen(event: str, **_: object) -> None:
        if event == FOUND:
            told.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield told
    finally:
        jax.monitoring.unregister_event_listener(listen)


def enable(folder: str | None) -> None:
    """Keeps compiled programs in `folder` (None: nowhere), unless JAX's own variable says where.

    Not on a CPU, whatever that variable says: each kernel is a file of its own there, and XLA loads
    them by a recursion that, from a thousand on, overflows the stack of its thread and ends the
    process. With all kernels in few files, as XLA's former emitters write them, it does not.
    """
    few_files = "cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() == "cpu" and not few_files:
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
