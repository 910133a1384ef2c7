"""Memory in huge pages: the program starts again, once, where that helps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft import huge_pages

PROGRAM = """
import os, pathlib, sys
from jaxft import huge_pages
huge_pages.KERNEL = pathlib.Path(sys.argv[1])
print("started")
huge_pages.ask()
block = bytearray(2**26)
block[::4096] = b"x" * 2**14
smaps = pathlib.Path("/proc/self/smaps_rollup")
huge = [line.split()[1] for line in smaps.read_text().splitlines() if "AnonHugePages" in line]
print(os.environ.get("GLIBC_TUNABLES", ""), *sys.argv[2:], *huge)
"""


def run(kernel: Path, tunables: str) -> tuple[int, list[str]]:
    """How often the program started, and what it says in the end: tunables, argument, huge kB."""
    others = {name: v for name, v in os.environ.items() if name != huge_pages.TUNABLES}
    env = others | ({huge_pages.TUNABLES: tunables} if tunables else {})
    command = [sys.executable, "-c", PROGRAM, str(kernel), "an argument"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    *starts, last = done.stdout.splitlines()
    return len(starts), last.split(" ")


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
@pytest.mark.parametrize(
    ("mode", "told", "starts", "tunables"),
    [
        ("always [madvise] never", "", 2, "glibc.malloc.hugetlb=1"),
        (
            *("always [madvise] never", "glibc.malloc.arena_max=8", 2),
            "glibc.malloc.arena_max=8:glibc.malloc.hugetlb=1",
        ),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", 1, "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", "", 1, ""),
        ("always madvise [never]", "", 1, ""),
        (None, "", 1, ""),
    ],
)
def test_a_program_starts_again_where_pages_are_to_be_asked_for(
    tmp_path: Path, mode: str | None, told: str, starts: int, tunables: str
):
    kernel = tmp_path / "enabled"
    if mode is not None:
        kernel.write_text(mode + "\n")
    count, (seen, *arguments) = run(kernel, told)
    assert (count, seen, arguments[:2]) == (starts, tunables, ["an", "argument"])


@pytest.mark.skipif(
    not huge_pages.KERNEL.exists() or "[madvise]" not in huge_pages.KERNEL.read_text(),
    reason="the kernel gives huge pages always, or never",
)
def test_large_blocks_then_lie_in_huge_pages():
    small, large = (
        int(run(huge_pages.KERNEL, told)[1][-1]) for told in ("glibc.malloc.hugetlb=0", "")
    )
    assert large - small >= 2**15  # kB, of 2**16
