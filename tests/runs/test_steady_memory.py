"""Freed memory is kept while programs are timed: nothing is fetched from the system again."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch

from modhifi.runs.timing import steady_memory as module
from modhifi.runs.timing.steady_memory import steady_memory
from modhifi.runs.timing.turns import time_in_turns

resource = pytest.importorskip("resource")
SIZE, TIMES = 8 * 2**20, 30


def faults() -> int:
    """Pages that the system had to hand out while a block was taken and freed again and again."""
    torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep freed memory")
def test_freed_memory_is_not_fetched_again_while_programs_are_timed() -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(module.MMAP_THRESHOLD, 2**17)  # as glibc begins
    fetched = faults()
    assert fetched >= TIMES  # large pages may be handed out
    with steady_memory():
        assert faults() < fetched / 4  # another allocation may take the block once
    seen: list[int] = []
    libc.mallopt(module.MMAP_THRESHOLD, 2**17)
    time_in_turns({"a": lambda: seen.append(faults())}, 1, rounds=5, round_seconds=1e-6)
    assert min(seen[2:]) < fetched / 4  # behind the passes that warm up


def test_without_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("there is no mallopt"))
    with steady_memory():
        pass
