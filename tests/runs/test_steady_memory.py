"""Freed memory is kept while programs are timed: nothing is fetched from the system again."""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from modhifi.errors import ModhifiError
from modhifi.runs import steady_memory as steady
from modhifi.runs.audit import run_audit
from modhifi.runs.compare import run_compare
from modhifi.runs.heal import run_heal
from modhifi.runs.prune import run_prune
from modhifi.runs.recipes.compare import CompareRecipe
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.runs.recipes.tasks import AuditRecipe, VerifyRecipe
from modhifi.runs.recipes.unlearn import UnlearnRecipe
from modhifi.runs.steady_memory import steady_memory
from modhifi.runs.unlearn import run_unlearn
from modhifi.runs.verify import run_verify

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


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the C library is told, by name."""
    calls: list[str] = []

    class Library:
        def mallopt(self, parameter: int, size: int) -> None:
            calls.append("keep" if (parameter, size) in steady.KEEP else "as before")

        def malloc_trim(self, pad: int) -> None:
            calls.append("give back")

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    return calls


def test_only_the_outermost_one_gives_memory_back(told: list[str]) -> None:
    with steady_memory():
        kept = list(told)
        with steady_memory():
            pass
        assert told == kept and "give back" not in kept
    assert told[len(kept) :].count("give back") == 1 and told[-1] == "give back"


MODEL, DATA = {"name": "nothing here"}, {"source": "nothing here"}


@pytest.mark.parametrize(
    ("run", "recipe", "content"),
    [
        (run_prune, PruneRecipe, {"model": MODEL}),
        (run_unlearn, UnlearnRecipe, {"model": MODEL, "forget": ["0"], "data": DATA}),
        (run_heal, HealRecipe, {"directory": "nothing here"}),
        (run_verify, VerifyRecipe, {"directory": "nothing here", "data": DATA}),
        (run_audit, AuditRecipe, {"directory": "nothing here", "data": DATA}),
        (run_compare, CompareRecipe, {"model": MODEL}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_runs_keep_freed_memory_and_give_it_back_even_when_they_fail(
    run: Callable[[Any], Any], recipe: Any, content: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(ModhifiError):
        run(recipe.model_validate(content))
    assert told[0] == "keep" and told[-1] == "give back"
