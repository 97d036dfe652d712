from __future__ import annotations

import json
import time
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_text
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import modhifi
from modhifi.artifacts.export import export
from modhifi.cli.main import app
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.runs.recipes.bench import Settings
from modhifi.runs.timing import turns
from modhifi.runs.timing.bench import BenchRow, _measured, bench_models
from modhifi.runs.timing.memory import activation_bytes
from modhifi.runs.timing.plot import draw
from modhifi.runs.timing.runtimes import RUNTIMES
from modhifi.runs.timing.subjects import subjects_of
from modhifi.runs.timing.turns import Spread, Turns, compare_latency, time_in_turns

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def linear(seed: int, inputs: int = 6, outputs: int = 4) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).eval().requires_grad_(False)


@pytest.mark.parametrize("device", DEVICES)
def test_latency_is_measured_in_turns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.name)
            return super().forward(x)

    models = {name: Noting(4, 4).to(device) for name in ("dense", "edited")}
    for name, model in models.items():
        model.name = name
    monkeypatch.setattr(turns, "ROUND_SECONDS", 1e-4)
    result = compare_latency(models, torch.randn(3, 4), rounds=4)
    dense, edited = result["dense"], result["edited"]
    assert dense.ratio == 1 and dense.ratio_iqr == 0
    assert dense.median > 0 and edited.median > 0 and edited.iqr >= 0 and edited.ratio > 0
    assert (edited.rounds, edited.batch, edited.threads) == (4, 3, torch.get_num_threads())
    assert edited.device.startswith(device)
    assert set(asdict(edited)) >= {"median", "iqr", "ratio"}
    # Every round ends where the next begins: dense edited | edited dense | dense edited | edited dense.
    order = [name for name, following in zip(calls, [*calls[1:], ""], strict=True) if name != following]
    assert order[-5:] == ["dense", "edited", "dense", "edited", "dense"]


class Scripted:
    """A timer that says what the script of its program says next, in place of the clock's time."""

    def __init__(self, _: str, globals: dict[str, Any], num_threads: int, timer: Any = None) -> None:
        self.script = globals["run"]
        self.clock = timer

    def timeit(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(mean=next(self.script))


def test_latency_takes_the_ratio_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine slows down from round to round; the edited model takes half the dense model's time throughout.
    # Before the rounds one pass warms up and one tells how many passes a round takes.
    monkeypatch.setattr(turns, "_timer", lambda: Scripted)
    scripts = {"dense": iter([9.0, 0.005, 1, 2, 3, 4, 5]), "edited": iter([9.0, 0.005, 0.5, 1, 1.5, 2, 2.5])}
    result = time_in_turns(scripts, 2, rounds=5, round_seconds=0.05)  # type: ignore[arg-type]
    assert Spread.of(result.seconds["dense"]) == Spread(3, 2)
    assert Spread.of(result.seconds["edited"]) == Spread(1.5, 1)
    assert result.ratio("edited", "dense") == Spread(0.5, 0) and result.passes == {"dense": 10, "edited": 10}


def test_slow_programs_get_fewer_rounds_and_never_under_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_timer", lambda: Scripted)
    for seconds, rounds in ((1.0, 10), (3.0, 5), (0.01, 21)):
        result = time_in_turns({"a": repeat(seconds)}, 2, most_seconds=10)  # type: ignore[dict-item]
        assert len(result.seconds["a"]) == rounds


@pytest.mark.parametrize(("threads", "on_gpu", "own"), [(1, False, True), (2, False, False), (1, True, False)])
def test_one_thread_on_a_cpu_is_timed_by_its_own_clock(
    threads: int, on_gpu: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = []

    class Noting(Scripted):
        def timeit(self, number: int) -> SimpleNamespace:
            clocks.append(self.clock)
            return super().timeit(number)

    monkeypatch.setattr(turns, "_timer", lambda: Noting)
    time_in_turns({"a": repeat(1.0)}, threads, on_gpu, rounds=1)  # type: ignore[dict-item]
    assert set(clocks) == {time.thread_time if own else None}


def test_latency_refuses_models_on_two_devices() -> None:
    with pytest.raises(ModhifiError, match="same"):
        compare_latency({"a": linear(0), "b": linear(0).to("meta")}, torch.randn(1, 6))


def test_activations_are_what_is_alive_at_once() -> None:
    # float32: 10 -> 100 -> 1000 -> 10; two neighbours are alive at a time, each input only until its reader is done.
    layers = nn.Sequential(nn.Linear(10, 100), nn.Linear(100, 1000), nn.Linear(1000, 10)).eval()
    batch = torch.zeros(2, 10)
    assert activation_bytes(lambda: layers(batch)) == 2 * 4 * (100 + 1000)
    assert activation_bytes(lambda: layers[0](batch).view(-1)[:3]) == 2 * 4 * 100  # a view holds nothing of its own


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(turns, "ROUNDS", 5)


@pytest.fixture(scope="module")
def small(model_dir: Path, image_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    modhifi.prune(
        model_dir, f"images:{image_dir}", ratio=0.3, samples=8, evaluation_samples=8, checks={"walked": 0}, out=out
    )
    return out


def test_an_artefact_is_timed_beside_its_original(small: Path, model_dir: Path, tmp_path: Path, quick: None) -> None:
    picture = tmp_path / "times.svg"
    done = CliRunner().invoke(
        app, ["bench", str(small), "--batch", "1,3", "--threads", "1", "--plot", str(picture), "--json", "--quiet"]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [(r["model"], r["reference"], r["batch"]) for r in rows] == [
        (name, str(model_dir), batch) for batch in (1, 3) for name in (str(model_dir), str(small))
    ]
    assert all(r["median"] > 0 and r["memory"] > 0 and r["rounds"] == 5 for r in rows)
    assert [r["ratio"] for r in rows[::2]] == [1, 1] and rows[1]["memory"] < rows[0]["memory"]
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "runtime", [pytest.param(r, marks=pytest.mark.slow if r == "compile" else ()) for r in RUNTIMES]
)
def test_every_runtime_runs_the_model(runtime: str) -> None:
    model, batch = linear(0), torch.randn(3, 6)
    outputs = RUNTIMES[runtime].load(model, batch)(batch, 1)()
    torch.testing.assert_close(torch.as_tensor(outputs), model(batch))


@pytest.mark.parametrize("runtime", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_language_model_is_timed_with_the_logits_of_the_last_token(runtime: str) -> None:
    model, batch = tiny_text.llama(), torch.randint(3, 50, (2, 7))
    outputs = RUNTIMES[runtime].load(model, batch)(batch, 1)()
    assert isinstance(outputs, Tensor)
    torch.testing.assert_close(outputs, model(batch).logits[:, -1:])


def test_onnx_files_are_timed_where_onnx_runs(tmp_path: Path, quick: None) -> None:
    loaded = load_model(linear(0), example=torch.randn(2, 6))
    export(loaded.model, loaded.example, tmp_path / "m.onnx", "onnx")
    subjects, _ = subjects_of([loaded, tmp_path / "m.onnx"], "cpu")
    rows = bench_models(subjects, Settings(runtime=["eager", "onnx"], threads=[1])).rows
    assert [r.median is not None for r in rows] == [True, False, True, True]
    assert "--runtime onnx" in rows[1].reason and rows[3].reference == "module:Linear"
    with pytest.raises(ModhifiError, match="--runtime onnx"):
        bench_models(subjects[1:], Settings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "greater than or equal to 1"),
        (["--threads", "4096"], "cores"),
        (["--runtime", "onx"], "did you mean 'onnx'"),
        (["--device", "mps"], "not available"),
        (["nothing.onnx"], "there is no file"),
    ],
)
def test_a_bench_of_what_is_not_there_is_refused_in_one_line(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "demo:resnet", *options])
    assert done.exit_code == 2 and message in done.output and len(done.output.splitlines()) == 1, done.output


def test_a_ratio_within_its_spread_says_nothing() -> None:
    rows = [BenchRow("a", "a", "eager", 1, 1, 1.0, 0.1, ratio, 0.1) for ratio in (1.05, 0.8)]
    assert [r.noisy for r in rows] == [True, False]


def test_a_chart_leaves_out_what_did_not_run(tmp_path: Path) -> None:
    draw([BenchRow("a", "a", "onnx", 1, 1, reason="not there")], tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size


def test_a_reference_that_does_not_run_leaves_no_ratio() -> None:
    row = BenchRow("b", "a", "eager", 1, 1)
    assert _measured(row, Turns({"b": (1.0, 3.0)}, {"b": 1})).ratio is None
