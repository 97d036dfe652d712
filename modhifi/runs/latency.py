"""The latency of a forward pass of several models, timed in turns on one machine."""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.runs.measure import Forward, device_of, plainly


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


def compare_latency(
    models: dict[str, nn.Module],
    batch: Tensor,
    forward: Forward = plainly,
    *,
    rounds: int = 21,
    min_run_time: float = 0.05,
) -> dict[str, Latency]:
    """Times the models on one batch in turns, so that a disturbance of the machine affects all of them alike.

    Every round times each model once, as the mean of as many passes as take about ``min_run_time`` seconds, by
    ``torch.utils.benchmark.Timer``. The order turns with the rounds. Uses torch's current number of threads. Raises
    ModhifiError unless all models are on one device.
    """
    devices = {device_of(model) for model in models.values()}
    if len(devices) != 1:
        raise ModhifiError("latency can only be compared between models on one device; move them to the same one")
    batch = batch.to(device := devices.pop())
    threads = torch.get_num_threads()
    timer_class, run = _timer(), torch.inference_mode()(forward)
    timers = [
        timer_class("run(model, batch)", globals={"run": run, "model": model, "batch": batch}, num_threads=threads)
        for model in models.values()
    ]
    passes = [_passes(timer, min_run_time) for timer in timers]
    seconds: list[list[float]] = [[] for _ in timers]
    for turn in range(rounds):
        for offset in range(len(timers)):
            index = (turn + offset) % len(timers)
            seconds[index].append(timers[index].timeit(passes[index]).mean)
    result = {}
    for index, name in enumerate(models):
        median, iqr = _median_iqr(seconds[index])
        ratio, ratio_iqr = _median_iqr(
            [time / first_time for time, first_time in zip(seconds[index], seconds[0], strict=True)]
        )
        result[name] = Latency(median, iqr, ratio, ratio_iqr, rounds, passes[index], len(batch), threads, str(device))
    return result


def _passes(timer: Any, seconds: float) -> int:
    """The number of passes that take about that long, after one that warms up."""
    timer.timeit(1)
    return max(1, math.ceil(seconds / timer.timeit(1).mean))


def _timer() -> Any:
    """The class ``torch.utils.benchmark.Timer``, imported without torch's warning of a missing CUDA toolkit."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.benchmark import Timer
    finally:
        logger.setLevel(level)
    return Timer


def _median_iqr(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], 0.0
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return median, third - first
