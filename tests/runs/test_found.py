"""Defects that were found by use, each with what it should have been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modhifi
from modhifi.artifacts.model_card import _files
from modhifi.artifacts.summary import check_summary, markdown, write_summary
from modhifi.bounds.certified import Certified
from modhifi.disk import check_file
from modhifi.errors import ModhifiError
from modhifi.healing.blocks import Cut, Match, Watch, has_blocks, matched_blocks
from modhifi.healing.teacher import Teacher
from modhifi.models.manifest import Manifest
from modhifi.models.plain_copy import plain_copy
from modhifi.models.weights import check_weights
from modhifi.pruning.stages import find_structure
from modhifi.runs.timing.operators import measure_operators
from modhifi.structure.clone import clone

FEW: dict[str, Any] = {"samples": 32, "evaluation_samples": 16, "checks": {"walked": 0}}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 24, batch_first=True)
        self.head = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(x)[0])
        return y


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Sequential(nn.Linear(16, 32), nn.GELU()), nn.Linear(32, 16)) for _ in range(3)
        )
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y[chosen == number] = expert(x[chosen == number])
        z: Tensor = self.out(x + y)
        return z


def test_a_file_that_modhifi_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    own = tmp_path / "notes.json"
    own.write_text('{"a": 1}')
    with pytest.raises(ModhifiError, match="modhifi did not write it as such a file"):
        check_file(own, "--out", json="all")
    report = tmp_path / "report.json"
    report.write_text('{\n "schema_version": 1,\n "title": "modhifi verify small",\n "task": "verify"\n}')
    check_file(report, "--out", json="figures")
    with pytest.raises(ModhifiError, match="as such a file"):  # a report is no table of scores
        check_file(report, "--out", json="all")
    (tmp_path / "empty.md").touch()
    check_summary(tmp_path / "empty.md")
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(ModhifiError, match="as such a file"):
        check_summary(tmp_path / "README.md")
    assert own.read_text() == '{"a": 1}'


def test_a_file_is_written_into_no_model_and_no_artefact(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    for path in (tmp_path / "config.json", tmp_path / "new.json"):
        with pytest.raises(ModhifiError, match="would be a file of a model"):
            check_file(path, "--out", json="all")
    (tmp_path / "small" / "inner").mkdir(parents=True)
    (tmp_path / "small" / "modhifi.json").write_text("{}")
    for path in (tmp_path / "small" / "README.md", tmp_path / "small" / "inner" / "s.md"):
        with pytest.raises(ModhifiError, match="would be a file of an artefact"):
            check_summary(path)
    with pytest.raises(ModhifiError, match="what the run writes there itself"):
        check_summary(tmp_path / "out" / "README.md", tmp_path / "out")
    check_summary(tmp_path / "out" / "s.md", tmp_path / "out")


@pytest.mark.parametrize("ending", ["md", "xml"])
def test_a_summary_of_an_earlier_run_is_replaced(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"s.{ending}"
    for _ in range(2):
        check_summary(path)
        write_summary(path, [("prune", {"title": "modhifi prune small", "verdicts": []})])
    assert markdown([("prune", {"title": "modhifi prune small"})]).startswith("### prune: modhifi ")


@pytest.mark.parametrize("ending", ["json", "csv", "safetensors"])
def test_scores_of_an_earlier_run_are_replaced(ending: str, tmp_path: Path) -> None:
    scores = modhifi.score(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(40, 5))
    path = tmp_path / f"s.{ending}"
    from modhifi.runs.score import write_scores

    for _ in range(2):
        check_file(path, "--out", json="all", csv="a table", safetensors="tensors")
        write_scores(scores, path)
    assert path.stat().st_size > 0


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_bench_s_picture_is_replaced_and_no_other(ending: str, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from modhifi.runs.timing.bench import BenchRow
    from modhifi.runs.timing.plot import draw

    for _ in range(2):
        check_file(tmp_path / f"b.{ending}", "--plot", png="a picture", svg="a drawing")
        draw([BenchRow("a", "a", "eager", 1, 1, 1.0, 0.1, 1.0, 0.0)], tmp_path / f"b.{ending}")
    Figure().savefig(tmp_path / f"own.{ending}")
    with pytest.raises(ModhifiError, match="as such a file"):
        check_file(tmp_path / f"own.{ending}", "--plot", png="a picture", svg="a drawing")


def test_a_time_is_not_predicted_for_what_does_not_run_alone() -> None:
    loaded = modhifi.load_model(Recurrent(), example=torch.randn(4, 12, 8))
    structure = find_structure(loaded)
    with pytest.raises(ModhifiError, match=r"the time of gru\.weight_.* --flops or --params in place of --latency"):
        measure_operators(loaded, structure, loaded.example, "eager", 1)
    (others,) = [[g.name for g in structure.prunable if not g.name.startswith("gru")]]
    operators = measure_operators(loaded, structure.select(others[-1:]), loaded.example, "eager", 1)
    assert {o.term.module for o in operators} <= {"head.0", "head.2"} and operators


def test_a_rung_that_is_not_available_violates_nothing() -> None:
    def bounds(measured: float, local: float, theorem: float) -> Certified:
        seen, second, rest, first = (torch.tensor([x], dtype=torch.float64) for x in (measured, local, 0.0, theorem))
        return Certified(torch.ones(1, 2).double(), seen, second, rest, first, theorem, None, 0.0, (), {}, 1.0)

    assert bounds(1.0, torch.inf, 2.0).violations() == ()
    assert bounds(1.0, 1.5, torch.inf).violations() == ()
    assert bounds(1.0, 3.0, 2.0).violations()[0].startswith("R2 > R1")
    assert bounds(torch.inf, 1.5, 2.0).violations()[0].startswith("measured > R2")


def test_only_blocks_with_a_row_for_each_item_are_matched() -> None:
    torch.manual_seed(0)
    model, data = Routed(), torch.randn(64, 16)
    with torch.no_grad():
        expert = int(model.router(data[:1]).argmax())
    loaded = modhifi.load_model(model, example=data[:1])  # one item, which one expert has: a row each
    assert f"experts.{expert}" in matched_blocks(loaded, clone(loaded.model), Cut())
    assert matched_blocks(loaded, clone(loaded.model), Cut(), [data[:5], data[:3]]) == {}


def test_a_block_whose_rows_differ_later_is_dropped() -> None:
    torch.manual_seed(0)
    data = torch.randn(12, 16)
    model = Routed()
    loaded = modhifi.load_model(model, example=data[:1])
    chosen = model.router(data).argmax(-1).tolist()
    first = chosen[0]
    alike = [i for i in range(12) if chosen[i] == first]
    teacher = Teacher(loaded, {f"experts.{first}": Match(f"experts.{first}")}, 12, keep=True)
    _, blocks = teacher.outputs(data[alike], alike)
    assert len(blocks) == 1 and len(blocks[0]) == len(alike)
    output, blocks = teacher.outputs(data, range(12))
    assert blocks == () and teacher.blocks == {} and bool(teacher.known.all())
    again, blocks = teacher.outputs(data, range(12))
    assert blocks == () and torch.equal(again, output)


def test_what_did_not_run_is_watched_no_more() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with Watch(model, ("0", "1")) as watch:
        model[0](torch.randn(3, 4))
        assert watch.let_go(3) == ("1",) and len(watch.take()) == 1


def test_a_mixture_written_by_hand_is_healed() -> None:
    torch.manual_seed(0)
    data = torch.randn(64, 16)
    model = modhifi.load_model(Routed(), example=data[:32])
    small = modhifi.prune(model, data, ratio=0.5, **FEW)
    healed = modhifi.heal(small.model or nn.Identity(), data, against=model, steps=2, **FEW)
    assert healed.report["healing"]["matched blocks"] == []
    assert any("a row for each item" in text for text in healed.report["warnings"])


def test_a_network_without_blocks_is_told_apart() -> None:
    assert not has_blocks(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert has_blocks(Routed())
    data = torch.randn(64, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    small = modhifi.prune(model, data, ratio=0.5, **FEW)
    healed = modhifi.heal(small.model or nn.Identity(), data, against=model, steps=2, **FEW)
    assert any("since the original has no list of blocks" in text for text in healed.report["warnings"])


def test_a_folded_weight_norm_can_be_pickled(tmp_path: Path) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
    model, notes = plain_copy(nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 2)), "net")
    torch.save(model, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    read.load_state_dict(model.state_dict())
    x = torch.randn(3, 4)
    assert notes and torch.allclose(read[0](x), F.linear(x, layer.weight, layer.bias))
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")  # the given layer still has its own


def test_complex_weights_are_called_by_their_name() -> None:
    model = nn.Linear(4, 4, dtype=torch.complex64)
    with pytest.raises(ModhifiError, match=r"torch\.complex64; complex weights are not supported") as error:
        check_weights(model, "net")
    assert "quantised" not in str(error.value)


def test_the_card_of_a_module_does_not_promise_that_its_recipe_runs() -> None:
    def files(source: str) -> str:
        return _files(Manifest.model_construct(base=_Named(source), weights=_Weights()), {})

    assert "`recipe.yaml`: repeats the run" in files("timm:resnet18")
    assert "`recipe.yaml`: the run's settings; the module itself is given from Python" in files("module:Net")


class _Named:
    def __init__(self, source: str) -> None:
        self.source = source


class _Weights:
    files = {"model.safetensors": ""}


def test_scores_of_a_model_without_parameters_are_refused_in_one_line() -> None:
    with pytest.raises(ModhifiError, match="no group of this model can be pruned"):
        modhifi.score(nn.Sequential(nn.ReLU()), torch.randn(40, 5))
