"""Several programs timed in turns on one machine, so that a disturbance affects all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.progress import muted
from modhifi.runs.measure import Forward, device_of, plainly
from modhifi.runs.steady_memory import steady_memory
from modhifi.runs.timing.runtimes.base import Run

ROUNDS = 21
FEWEST_ROUNDS = 5
# Seconds that one program runs in one round, and that all rounds together take at most.
ROUND_SECONDS = 0.05
MOST_SECONDS = 60.0


@dataclass(frozen=True)
class Spread:
    """The median of several figures and their interquartile range: the third quartile minus the first."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one figure; a single one has no range."""
        if len(values) < 2:
            return cls(values[0], 0.0)
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, third - first)


def ratio(times: Sequence[float], reference: Sequence[float]) -> Spread:
    """The spread of the ratios of two lists of figures, pair by pair."""
    return Spread.of([time / other for time, other in zip(times, reference, strict=True)])


@dataclass(frozen=True)
class Turns:
    """The seconds of one pass of every program, a figure a round, and the passes behind each figure."""

    seconds: Mapping[str, tuple[float, ...]]
    passes: Mapping[str, int]

    def ratio(self, name: str, reference: str) -> Spread:
        """One program's time over another's, round by round."""
        return ratio(self.seconds[name], self.seconds[reference])


@dataclass(frozen=True)
class Latency:
    """The time of one forward pass of one model, and its ratio to the first model of the same comparison."""

    median: float  # seconds a batch
    iqr: float  # seconds, third quartile minus first
    ratio: float  # median over the rounds of this model's time by the first model's in the same round
    ratio_iqr: float
    rounds: int
    passes: int  # forward passes behind every round's time
    batch: int  # items in the batch
    threads: int
    device: str


def time_in_turns(
    runs: Mapping[str, Run],
    threads: int,
    on_gpu: bool = False,
    *,
    rounds: int | None = None,
    round_seconds: float | None = None,
    most_seconds: float = MOST_SECONDS,
) -> Turns:
    """Times every program once a round, by ``torch.utils.benchmark.Timer``; the order turns with the rounds.

    A round's figure is the mean of as many passes as take about ``round_seconds`` (0.05); two passes before the first
    round warm up. There are fewer rounds, at least 5, where they would take more than ``most_seconds`` together. One
    thread on a CPU is timed by its own clock, which stands still while other processes have the core. Freed memory is
    kept meanwhile (:mod:`modhifi.runs.steady_memory`).
    """
    timer_class = _timer()
    clock = {"timer": time.thread_time} if threads == 1 and not on_gpu else {}
    timers = {
        name: timer_class("run()", globals={"run": run}, num_threads=threads, **clock) for name, run in runs.items()
    }
    with steady_memory():
        return _in_turns(timers, rounds or ROUNDS, round_seconds or ROUND_SECONDS, most_seconds)


def _in_turns(timers: Mapping[str, Any], rounds: int, round_seconds: float, most_seconds: float) -> Turns:
    passes, one_round = {}, 0.0
    for name, timer in timers.items():
        timer.timeit(1)
        seconds = timer.timeit(1).mean
        passes[name] = max(1, math.ceil(round_seconds / seconds))
        one_round += passes[name] * seconds
    rounds = min(rounds, max(FEWEST_ROUNDS, int(most_seconds / one_round)))
    names, taken = list(timers), {name: [0.0] * rounds for name in timers}
    for turn in range(rounds):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            taken[name][turn] = timers[name].timeit(passes[name]).mean
    return Turns({name: tuple(values) for name, values in taken.items()}, passes)


def compare_latency(
    models: Mapping[str, nn.Module], batch: Tensor, forward: Forward = plainly, *, rounds: int | None = None
) -> dict[str, Latency]:
    """Times one forward pass of each model on one batch, in turns, with torch's current number of threads.

    Raises ModhifiError unless all models are on one device.
    """
    devices = {device_of(model) for model in models.values()}
    if len(devices) != 1:
        raise ModhifiError("latency can only be compared between models on one device; move them to the same one")
    batch, threads = batch.to(devices.pop()), torch.get_num_threads()
    run = torch.inference_mode()(forward)
    runs = {name: partial(run, model, batch) for name, model in models.items()}
    turns = time_in_turns(runs, threads, batch.device.type != "cpu", rounds=rounds)
    first, result = next(iter(models)), {}
    for name, seconds in turns.seconds.items():
        own, relative = Spread.of(seconds), turns.ratio(name, first)
        result[name] = Latency(
            own.median,
            own.iqr,
            relative.median,
            relative.iqr,
            len(seconds),
            turns.passes[name],
            len(batch),
            threads,
            str(batch.device),
        )
    return result


def _timer() -> Callable[..., Any]:
    """The class ``torch.utils.benchmark.Timer``, imported without torch's warning of a missing CUDA toolkit."""
    with muted("torch.utils.cpp_extension"):
        from torch.utils.benchmark import Timer
    return Timer
