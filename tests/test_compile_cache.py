"""Compiled programs are kept where they can be loaded again."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
from jaxft import compile_cache
compile_cache.enable(None)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
with compile_cache.found() as found:
    jax.jit(lambda x: x * 2).lower(1.0).compile()
print(len(found))
"""


@pytest.mark.parametrize(("emitters", "expected"), [("true", 0), ("false", 1)])
def test_a_cpu_loads_no_program_of_many_files(tmp_path, emitters, expected):
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "XLA_FLAGS": f"--xla_cpu_use_fusion_emitters={emitters}",
    }
    command = [sys.executable, "-c", PROGRAM]
    for count in (0, expected):
        done = subprocess.run(
            command, env=os.environ | kept, capture_output=True, text=True, check=True
        )
        assert int(done.stdout) == count
