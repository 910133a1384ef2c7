"""Large arrays of a CPU in huge pages of memory.

XLA takes memory for a program's temporaries anew each time and gives it back, and the kernel
clears it page by page: a quarter of a step's time. In pages of 2 MiB it is little.
"""

import os
import sys
from pathlib import Path

TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask() -> None:
    """Starts this program again, once, with glibc told to ask for huge pages; it reads that only
    at the start. Where the kernel gives them unasked or never, or the user chose, nothing is done.
    """
    told = os.environ.get(TUNABLES, "")
    if HUGE_PAGES in told or not KERNEL.exists() or "[madvise]" not in KERNEL.read_text():
        return
    tunables = ":".join(filter(None, (told, f"{HUGE_PAGES}=1")))
    sys.stdout.flush()
    os.execve(
        sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {TUNABLES: tunables}
    )
