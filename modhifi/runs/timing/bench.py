"""Models side by side in one process: their latency by runtime, batch and threads, and the memory that a pass needs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modhifi.artifacts.formatting import noisy
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent, version_of
from modhifi.runs.recipes.bench import Settings
from modhifi.runs.timing.machine import device_name
from modhifi.runs.timing.memory import peak_bytes
from modhifi.runs.timing.runtimes import RUNTIMES
from modhifi.runs.timing.runtimes.base import Program, Run
from modhifi.runs.timing.subjects import Subject
from modhifi.runs.timing.turns import Spread, Turns, time_in_turns

PACKAGES = ("torch", "onnxruntime")


@dataclass(frozen=True)
class BenchRow:
    """One model in one setting. Figures are None where ``reason`` says why there are none.

    ``median`` and ``iqr`` are seconds a batch, ``ratio`` is this model's time over that of ``reference`` in the same
    round, ``memory`` bytes (see :func:`modhifi.runs.timing.memory.peak_bytes`).
    """

    model: str
    reference: str
    runtime: str
    batch: int
    threads: int
    median: float | None = None
    iqr: float | None = None
    ratio: float | None = None
    ratio_iqr: float | None = None
    memory: int | None = None
    rounds: int = 0
    passes: int = 0
    reason: str = ""

    @property
    def per_second(self) -> float | None:
        """Items a second."""
        return None if self.median is None else self.batch / self.median

    @property
    def noisy(self) -> bool:
        """Whether the ratio differs from 1 by no more than its spread."""
        return self.ratio is not None and self.ratio_iqr is not None and noisy(self.ratio, self.ratio_iqr)


@dataclass(frozen=True)
class Bench:
    """The rows of a bench, on one machine; ``notes`` are sentences."""

    rows: tuple[BenchRow, ...]
    device: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The bench as JSON-able data."""
        return {
            "device": self.device,
            "versions": {name: version_of(name) for name in PACKAGES},
            "notes": list(self.notes),
            "rows": [{**asdict(r), "per_second": r.per_second, "noisy": r.noisy} for r in self.rows],
        }


def bench_models(
    subjects: Sequence[Subject], settings: Settings, notes: Sequence[str] = (), progress: Progress = silent
) -> Bench:
    """Times every subject in every runtime, batch size and number of threads, by default torch's current one.

    All subjects of one setting are timed in turns. A subject that a runtime cannot run gets a row with the reason.
    Raises ModhifiError where no subject runs in any runtime.
    """
    threads = settings.threads or [torch.get_num_threads()]
    check_threads(threads)
    pairs = [(b, t) for b in settings.batch for t in threads]
    rows: list[BenchRow] = []
    for runtime in settings.runtime:
        programs, reasons = _programs(subjects, runtime, settings.window)
        for number, (batch, count) in enumerate(pairs):
            progress(f"timing {runtime}", number, len(pairs))
            inputs = {s.label: s.batch(batch, settings.window) for s in subjects if s.label in programs}
            rows += _rows(subjects, runtime, programs, inputs, dict(reasons), batch, count)
        progress(f"timing {runtime}", len(pairs), len(pairs))
    if all(row.median is None for row in rows):
        raise ModhifiError(rows[0].reason)
    return Bench(tuple(rows), device_name(subjects[0].device), tuple(notes))


def check_threads(threads: Sequence[int]) -> None:
    """Raises ModhifiError for more threads than the process may use cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if max(threads) > cores:
        raise ModhifiError(f"{max(threads)} threads are more than the {cores} cores here; give --threads {cores}")


def _programs(
    subjects: Sequence[Subject], runtime: str, window: int | None
) -> tuple[dict[str, Program], dict[str, str]]:
    """What the runtime made ready of each subject by its label, and why it could not."""
    programs, reasons = {}, {}
    for subject in subjects:
        try:
            programs[subject.label] = subject.load(RUNTIMES[runtime], window)
        except ModhifiError as error:
            reasons[subject.label] = str(error)
    return programs, reasons


def _rows(
    subjects: Sequence[Subject],
    runtime: str,
    programs: Mapping[str, Program],
    inputs: Mapping[str, Tensor],
    reasons: dict[str, str],
    batch: int,
    threads: int,
) -> list[BenchRow]:
    """The rows of one setting, a row a subject."""
    runs: dict[str, Run] = {}
    for label, program in programs.items():
        try:
            runs[label] = program(inputs[label], threads)
        except ModhifiError as error:
            reasons[label] = str(error)
    turns = time_in_turns(runs, threads, subjects[0].device.type != "cpu") if runs else Turns({}, {})
    rows = []
    for subject in subjects:
        row = BenchRow(subject.label, subject.reference, runtime, batch, threads, reason=reasons.get(subject.label, ""))
        if subject.label in runs:
            row = _measured(row, turns)
            if isinstance(subject.model, LoadedModel):
                memory = peak_bytes(subject.model.model, runs[subject.label], runtime == "eager")
                row = replace(row, memory=memory)
        rows.append(row)
    return rows


def _measured(row: BenchRow, turns: Turns) -> BenchRow:
    """The row with its figures; without a ratio where its reference did not run."""
    seconds = turns.seconds[row.model]
    own = Spread.of(seconds)
    row = replace(row, median=own.median, iqr=own.iqr, rounds=len(seconds), passes=turns.passes[row.model])
    if row.reference not in turns.seconds:
        return row
    relative = turns.ratio(row.model, row.reference)
    return replace(row, ratio=relative.median, ratio_iqr=relative.iqr)
