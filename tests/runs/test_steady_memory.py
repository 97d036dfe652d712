"""Freed memory is kept while programs are timed: nothing is fetched from the system again."""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys

import pytest

from modhifi.runs.steady_memory import steady_memory

pytest.importorskip("resource")

# In a process of its own: other tests leave free blocks that serve any request.
COUNT = """
import ctypes, json, resource
import torch
from modhifi.runs.steady_memory import MMAP_THRESHOLD, steady_memory
from modhifi.runs.timing.turns import time_in_turns

def faults():
    torch.empty(8 * 2**20, dtype=torch.uint8).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        torch.empty(8 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

libc = ctypes.CDLL(None)
libc.mallopt(MMAP_THRESHOLD, 2**17)  # as glibc begins
plain, seen = faults(), []
with steady_memory():
    steady = faults()
libc.mallopt(MMAP_THRESHOLD, 2**17)
time_in_turns({"a": lambda: seen.append(faults())}, 1, rounds=5, round_seconds=1e-6)
print(json.dumps([plain, steady, min(seen[2:])]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep freed memory")
def test_freed_memory_is_not_fetched_again_while_programs_are_timed() -> None:
    """Pages that the system had to hand out while a block was taken and freed again and again."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    plain, steady, timed = json.loads(done.stdout)
    assert plain >= 30  # large pages may be handed out
    assert steady < plain / 4 and timed < plain / 4


def test_without_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("there is no mallopt"))
    with steady_memory():
        pass
