"""Times of operators and of whole networks, with a timer that counts in place of a clock."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_transformers
import torch
from torch import nn

import modhifi
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.layouts.base import EXACT
from modhifi.pruning.metered import Attempt, Metered
from modhifi.pruning.stages import find_structure
from modhifi.runs.inputs import Given
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.runs.reports.prune import metered_verdict, metered_warnings
from modhifi.runs.run_recipe import run_recipe
from modhifi.runs.run_task import Circumstances
from modhifi.runs.timing import layers, operators, turns
from modhifi.runs.timing.decoding import decoding
from modhifi.runs.timing.networks import Timer, plan_of
from modhifi.runs.timing.operators import measure_operators
from modhifi.runs.timing.runtimes import RUNTIMES
from modhifi.structure.groups import Structure
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import shrink
from modhifi.structure.times import OperatorTime, Times

LAYERS = [
    nn.Conv2d(6, 4, 3, 2, 1, groups=2),
    nn.Conv2d(6, 4, (3, 1), padding=(1, 0), bias=False),
    nn.Conv1d(6, 6, 3, padding=2, dilation=2, groups=6),
    nn.Linear(6, 4),
    nn.Linear(6, 4, bias=False),
]


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_runtime_runs_a_layer_alone(layer: nn.Module, runtime: str) -> None:
    batch = torch.randn(2, 6, 7, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, 6, 6)
    outputs = RUNTIMES[runtime].operator(layer.eval().requires_grad_(False), batch, 1)()
    torch.testing.assert_close(torch.as_tensor(outputs), layer(batch))


class Counting:
    """A timer that knows no time: a second a pass, and how many programs were timed."""

    timed = 0

    def __init__(self, _: str, globals: dict[str, Any], **__: Any) -> None:
        Counting.timed += 1
        self.run = globals["run"]

    def timeit(self, number: int) -> SimpleNamespace:
        self.run()
        return SimpleNamespace(mean=1.0)


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setattr(turns, "_timer", lambda: Counting)
    Counting.timed = 0
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU()]
    tail = [nn.Conv2d(32, 64, 1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)]
    return load_model(nn.Sequential(*layers, *tail), example=torch.randn(2, 3, 8, 8))


def test_every_operator_is_timed_on_a_grid_of_its_widths_and_once(net: LoadedModel, tmp_path: Path) -> None:
    structure = find_structure(net)
    times = measure_operators(net, structure, net.example, "eager", 1, tmp_path)
    grids = {t.term.module: (t.inputs, t.outputs, t.elements) for t in times}
    step = times[0].at_once

    def points(total: int) -> tuple[int, ...]:
        return tuple(sorted({step // 2} | {max(1, round(s * total / step)) * step for s in operators.SHARES}))

    assert grids == {
        "0": ((3,), points(32), 2 * 32 * 64),
        "2": ((32,), points(32), 2 * 32 * 64),  # depthwise: the input is as wide as the output
        "4": (points(32), points(64), 2 * 64 * 16),
        "8": (points(64), (5,), 2 * 5),
    }
    timed = sum(len(t.inputs) * len(t.outputs) for t in times)
    assert Counting.timed == timed
    assert measure_operators(net, structure, net.example, "eager", 1, tmp_path) == times and Counting.timed == timed
    measure_operators(net, structure, net.example, "eager", 2, tmp_path)  # another number of threads, another time
    assert Counting.timed == 2 * timed


def test_a_broken_cache_is_measured_again(net: LoadedModel, tmp_path: Path) -> None:
    structure = find_structure(net)
    times = measure_operators(net, structure, net.example, "eager", 1, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text("[]")
    assert measure_operators(net, structure, net.example, "eager", 1, tmp_path) == times


def test_whole_networks_bring_the_prediction_to_scale(net: LoadedModel) -> None:
    structure = find_structure(net)
    meter = Timer("eager", 2, 1)
    times = meter.gauge(net, structure, EXACT)
    # every network takes a second, whatever its widths, and so do four operators each
    assert times.amount({}) == pytest.approx(1, rel=0.01)
    assert times.amount({g.name: 1 for g in structure.prunable}) == pytest.approx(1, rel=0.01)
    assert meter.ratio(net, structure, plan_of(structure, {"0": 8})) == (1.0, 0.0)


def test_operators_are_timed_inside_both_networks(net: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # The clock counts how often it is asked: once at the start, once an operator, once at the end.
    ticks = itertools.count()
    monkeypatch.setattr(layers, "clock_of", lambda *_: lambda: float(next(ticks)))
    structure = find_structure(net)
    measured = Timer("eager", 2, 1).by_operator(net, structure, plan_of(structure, {"0": 8}))
    # what precedes the first operator is its own: the clock is asked there once more
    assert measured == {"0": (2.0, 2.0), "2": (1.0, 1.0), "4": (1.0, 1.0), "8": (1.0, 1.0)}
    assert Timer("onnx", 2, 1).by_operator(net, structure, plan_of(structure, {"0": 8})) == {}


def test_a_verdict_on_a_time_says_where_what_is_left_goes(net: LoadedModel) -> None:
    structure, attempt = find_structure(net), Attempt(0.5, 0.5, 0.01)
    seconds = {"0": (1.0, 0.2), "2": (1.0, 0.9), "4": (4.0, 2.5), "8": (1.0, 0.4)}
    metered = Metered("latency", 0.5, 1.0, (attempt,), attempt, {}, 0.0, seconds)
    pruned: Any = SimpleNamespace(metered=metered, structure=structure, plan=plan_of(structure, {"0": 8}))
    # a quarter of the first three layers' multiply-adds is left, and the last one is as it was
    (verdict,) = metered_verdict(net, pruned)
    assert "10 % is spent in layers that keep their widths, 22 % in layers that got faster" in verdict["text"]


def test_widths_make_a_plan_that_can_be_cut(net: LoadedModel) -> None:
    structure = find_structure(net)
    names = [g.name for g in structure.prunable]
    plan = plan_of(structure, {names[0]: 8, names[1]: structure.prunable[1].n})
    assert plan.kept == {names[0]: tuple(range(8))}
    small = shrink(load_model(net.model, example=net.example).model, structure, plan)
    assert small(net.example).shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": "0.5x", "timing": {"latency_batch": 0}}, "greater than or equal to 1"),
        ({"latency": "0.5x", "timing": {"threads": 4096}}, "cores"),
        ({"latency": "0.5x", "offload": True}, "--offload"),
        ({"latency": "1000s"}, "already"),
        ({"latency": "0.01x"}, "least width"),
        ({"latency": "0.5x", "ratio": 0.5}, "exactly one"),
    ],
)
def test_times_that_cannot_be_are_refused_in_one_line(options: dict[str, Any], message: str, net: LoadedModel) -> None:
    with pytest.raises(ModhifiError, match=message):
        modhifi.prune(net, torch.randn(16, 3, 8, 8), checks={"walked": 0}, **options)


def test_a_runtime_without_its_packages_is_refused_before_the_work(
    net: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModhifiError, match=r"pip install 'modhifi\[onnx\]'"):
        modhifi.prune(net, torch.randn(16, 3, 8, 8), latency="0.5x", timing={"runtime": "onnx"})
    assert not Counting.timed


@pytest.mark.parametrize(
    ("measured", "spread", "expected"),
    [(0.52, 0.02, []), (0.6, 0.02, ["0.6x was reached"]), (0.9, 0.2, ["0.9x was reached", "too busy to say"])],
)
def test_a_time_that_is_missed_or_uncertain_is_a_warning(measured: float, spread: float, expected: list[str]) -> None:
    attempt = Attempt(0.5, measured, spread)
    pruned: Any = SimpleNamespace(metered=Metered("latency", 0.5, 1.0, (attempt,), attempt, {}, 0.0))
    warnings = metered_warnings(pruned)
    assert len(warnings) == len(expected) and all(e in w for e, w in zip(expected, warnings, strict=True))
    (verdict,) = metered_verdict(None, pruned)  # type: ignore[arg-type]
    assert f"{measured:.3f} ± {spread:.3f}x measured" in verdict["text"]


def test_a_step_reads_the_cache_of_all_before_it_each_time_anew() -> None:
    model = tiny_transformers.family("llama")[0].float()
    batch = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    run = decoding(model, batch)
    with torch.no_grad():
        expected = model(batch).logits[:, -1:]
    for _ in range(2):
        torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize(
    ("timing", "message"), [({"phase": "decode"}, "causal language model"), ({"runtime": "onnx"}, "eager mode")]
)
def test_a_phase_that_cannot_be_timed_is_refused(timing: dict[str, Any], message: str, net: LoadedModel) -> None:
    model: Any = net if "phase" in timing else tiny_transformers.family("llama")[0].float()
    data = torch.randn(16, 3, 8, 8) if "phase" in timing else torch.randint(3, 50, (16, 12))
    with pytest.raises(ModhifiError, match=message):
        modhifi.prune(model, data, latency="0.5x", timing={"phase": "decode", **timing})


def prices(loaded: LoadedModel, structure: Structure) -> Times:
    """A second for every component that is left."""
    sizes = sizes_of(loaded.model, structure)
    terms = [t for t in sizes.terms if t.module in structure.operators]
    operators = [OperatorTime(t, (1, t.input_total), (1, t.output_total), ((0, 0), (1, 9)), 0) for t in terms]
    return Times(tuple(operators), sizes.full)


@pytest.mark.parametrize(("tolerance", "fails"), [({}, False), ({"max_flip": 1.0}, True)])
@pytest.mark.parametrize("spread", [0.01, 0.5])
def test_a_time_that_cannot_be_told_fails_a_run_with_a_tolerance(
    tolerance: dict[str, float], fails: bool, spread: float, net: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Timer, "ratio", lambda *_: (0.8, spread))
    monkeypatch.setattr(Timer, "gauge", lambda _, loaded, structure, rounding: prices(loaded, structure))
    content = {"model": {"name": "module"}, "budget": {"latency": "0.8x"}, "checks": {"walked": 0, **tolerance}}
    given = Given(model=net, data=torch.randn(16, 3, 8, 8))
    (done,) = run_recipe(PruneRecipe.model_validate(content), Circumstances("cpu", given))
    assert (done.failure is not None) == (fails and spread > 0.2)
    assert done.failure is None or "too busy" in str(done.failure)
