"""JAX's cache of compiled programs, kept from one run to the next."""

import os
from pathlib import Path

import jax

SHORTEST = 0.5
"""Seconds of compilation from which on a program is kept."""


def enable(folder: str | None) -> None:
    """Keeps compiled programs in `folder` (None: nowhere), unless JAX's own variable says where."""
    if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
