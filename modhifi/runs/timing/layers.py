"""The time of every operator inside a whole network, with the elementwise work that follows it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from modhifi.models.hooks import attached
from modhifi.runs.steady_memory import steady_memory
from modhifi.runs.timing.runtimes.base import Run

ROUNDS = 9


def seconds_by_operator(
    networks: Sequence[tuple[Run, Mapping[str, nn.Module]]], threads: int, device: torch.device
) -> list[dict[str, float]]:
    """The median seconds of each network's operators, the networks in turns: from where one begins to the next.

    An operator that runs several times has the sum, the first one also what precedes it, and the last one what follows.
    A GPU is waited for at every boundary.
    """
    clock = clock_of(threads, device)
    taken: list[dict[str, list[float]]] = [defaultdict(list) for _ in networks]
    with steady_memory():
        for turn in range(ROUNDS + 1):
            for number, (run, operators) in enumerate(networks):
                seconds = _one_pass(run, operators, clock)
                for name in operators if turn else ():  # the first turn warms up
                    taken[number][name].append(seconds.get(name, 0.0))
    return [{name: median(rounds) for name, rounds in network.items()} for network in taken]


def clock_of(threads: int, device: torch.device) -> Callable[[], float]:
    """One thread of a CPU has its own clock, which stands still while other processes have the core."""
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronized
    return time.thread_time if threads == 1 else time.perf_counter


def _one_pass(run: Run, operators: Mapping[str, nn.Module], clock: Callable[[], float]) -> dict[str, float]:
    marks: list[tuple[str, float]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks.append((name, clock()))

        return hook

    with attached([module.register_forward_pre_hook(note(name)) for name, module in operators.items()]):
        begin = clock()
        run()
        end = clock()
    seconds: dict[str, float] = defaultdict(float)
    borders = [begin, *(mark for _, mark in marks[1:]), end]
    for (name, _), start, stop in zip(marks, borders, borders[1:], strict=False):
        seconds[name] += stop - start
    return seconds
