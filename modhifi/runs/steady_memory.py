"""Freed memory is kept through a run, and while programs are timed.

By default glibc gives large blocks back to the system and fetches them again, page by page: the same operator then
takes up to three times as long, depending on the sizes that were freed before (eval/results/steady_memory.md), and
passes over calibration data up to twice. Servers that allocate with jemalloc or tcmalloc, or with
MALLOC_TRIM_THRESHOLD_ set, see none of that, and a ratio of two networks should not.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3).
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
MIB = 2**20
# The largest sizes that mallopt takes while programs run, and afterwards those at which glibc arrives by itself. The
# second threshold for mapping is for versions that take no larger one.
KEEP = ((TRIM_THRESHOLD, 2047 * MIB), (TOP_PAD, 64 * MIB), (MMAP_THRESHOLD, 32 * MIB), (MMAP_THRESHOLD, 1024 * MIB))
AFTERWARDS = ((TRIM_THRESHOLD, 64 * MIB), (TOP_PAD, 0), (MMAP_THRESHOLD, 32 * MIB))
# How many are open.
_open = 0


@contextmanager
def steady_memory() -> Iterator[None]:
    """While it is open freed memory stays with the process; without glibc nothing changes.

    Only the outermost one changes anything.
    """
    global _open
    if _open or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for parameter, size in KEEP:
        libc.mallopt(parameter, size)
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        for parameter, size in AFTERWARDS:
            libc.mallopt(parameter, size)
        libc.malloc_trim(0)
