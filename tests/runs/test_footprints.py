"""The memory of a pass, counted operation by operation, and runs that meet a budget of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modhifi
from modhifi.models.load import load_model
from modhifi.pruning.layouts.base import EXACT
from modhifi.pruning.stages import find_structure
from modhifi.runs.measure import stored_bytes
from modhifi.runs.timing.footprints import MemoryMeter
from modhifi.runs.timing.memory import activation_bytes, bytes_by_writer
from modhifi.runs.timing.networks import plan_of


def test_results_belong_to_the_operator_that_ran_last() -> None:
    first, second, batch = nn.Linear(10, 100, bias=False), nn.Linear(100, 1, bias=False), torch.randn(2, 10)

    def run() -> None:
        second(first(batch + 0).relu())

    with torch.no_grad():
        instants = bytes_by_writer(run, {"first": first, "second": second})
        most = max(sum(held.values()) for held in instants)
        assert most == activation_bytes(run)
    # the input, what the first layer puts out beside it, beside its positive part, and that beside the result
    assert instants == [{"": 80}, {"": 80, "first": 800}, {"first": 1600}, {"first": 800}, {"first": 800, "second": 8}]


@pytest.mark.parametrize("batch", [1, 8])
def test_the_prediction_is_what_a_network_of_these_widths_holds(batch: int) -> None:
    loaded = load_model("demo:resnet")
    structure = find_structure(loaded)
    meter = MemoryMeter(batch)
    gauge = meter.gauge(loaded, structure, EXACT)
    weights, run = stored_bytes(loaded.model), meter._run(loaded.model, meter._inputs(loaded))
    assert gauge.amount({}) == pytest.approx(weights + activation_bytes(run), rel=0.01)
    widths = {g.name: g.n // 2 for g in structure.prunable}
    measured, spread = meter.ratio(loaded, structure, plan_of(structure, widths))
    assert gauge.amount(widths) / gauge.amount({}) == pytest.approx(measured, rel=0.01) and spread == 0


def test_a_run_meets_the_memory_that_was_asked_for() -> None:
    samples, checks = {"evaluation_samples": 32, "samples": 32}, {"walked": 0}
    timing = {"latency_batch": 8}
    small = modhifi.prune("demo:resnet", "demo:calibration", memory="4MB", timing=timing, checks=checks, **samples)
    metered = small.report["metered"]
    assert metered["taken"]["measured"] * metered["dense"] == pytest.approx(4e6, rel=0.05)
    assert small.report["budget"]["reached"]["memory"] == metered["taken"]["measured"]
    (verdict,) = [v for v in small.report["verdicts"] if v["name"] == "memory of a pass"]
    assert "x of the memory asked for" in verdict["text"] and "±" not in verdict["text"]
