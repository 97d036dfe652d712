"""Models whose outputs are values and no scores of classes: regressions, rerankers, depths, forecasts, embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import tiny_parts
import tiny_text
import torch
import transformers
from timm.models import save_for_hf
from tiny_timm import resnet
from torch import Tensor, nn
from typer.testing import CliRunner

import modhifi
from modhifi.bounds.held_out import tabulate
from modhifi.cli.main import app
from modhifi.data.in_memory import from_items
from modhifi.data.mixture import mixed
from modhifi.healing.examination import Examination
from modhifi.models.load import load_model
from modhifi.runs.reports.measurements import measure_errors

SIZES: dict[str, Any] = {
    "vocab_size": tiny_text.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def bert(head: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, f"Bert{head}")(transformers.BertConfig(**SIZES, **more)).eval()


def depths() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GLPNConfig(hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=8, num_attention_heads=[1, 2, 2, 2])
    return transformers.GLPNForDepthEstimation(config).eval()


class Scorer(nn.Module):
    """One number for every item, from hidden layers that matter unequally."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))
        with torch.no_grad():
            self.layers[2].weight[32:] = 0.1 * self.layers[2].weight[:1]  # half of the neurons hardly differ
            self.layers[-1].bias += 100

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1)


ITEMS = torch.randn(160, 12, generator=torch.Generator().manual_seed(3))
AMOUNTS: dict[str, Any] = {"samples": 96, "evaluation_samples": 64, "checks": {"walked": 0}}


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (lambda: resnet(), False),
        (lambda: timm.create_model("resnet10t", num_classes=0, stem_width=8, channels=(8, 8, 8, 8)), True),
        (lambda: timm.create_model("resnet10t", num_classes=1, stem_width=8, channels=(8, 8, 8, 8)), True),
        (lambda: bert("Model"), True),
        (lambda: bert("ForSequenceClassification", num_labels=3), False),
        (lambda: bert("ForSequenceClassification", num_labels=1), True),
        (lambda: bert("ForSequenceClassification", num_labels=3, problem_type="regression"), True),
        (lambda: bert("ForSequenceClassification", num_labels=3, return_dict=False), False),
        (lambda: bert("Model", return_dict=False), True),
        (lambda: bert("ForMaskedLM"), False),
        (lambda: bert("ForQuestionAnswering"), False),
        (lambda: bert("ForPreTraining"), False),
        (lambda: tiny_text.llama(), False),
        (depths, True),
        (lambda: tiny_parts.model("patchtst"), True),
        (lambda: tiny_parts.model("clip"), True),
        (lambda: tiny_parts.model("wav2vec2"), False),
        (lambda: tiny_parts.model("detr"), False),
    ],
)
def test_the_head_says_whether_outputs_are_values(model: Any, values: bool) -> None:
    assert load_model(model().eval()).gives_values is values


def test_of_a_module_of_ones_own_the_width_tells_or_whoever_loads_it() -> None:
    example = ITEMS[:2]
    assert load_model(Scorer(), example=example).gives_values
    assert not load_model(Scorer(3), example=example).gives_values
    assert load_model(Scorer(3), example=example, values=True).gives_values


def test_a_regression_is_pruned_and_judged_by_the_variance_that_it_keeps() -> None:
    net = Scorer()
    small = modhifi.prune(net, ITEMS, ratio=0.5, **AMOUNTS)
    first, *others = small.report["before_after"]
    held = from_items(ITEMS, None, n=160, seed=0).subset(range(96, 160))
    inputs = torch.stack([held.load(i) for i in range(len(held))])
    with torch.no_grad():
        wanted, got = net(inputs), small.model(inputs)
    lost = (got - wanted).square().mean() / wanted.var(correction=0)
    assert first["name"].endswith("variance kept (R²)") and first["after"] == pytest.approx(1 - float(lost), rel=1e-3)
    assert not [row for row in others if "agreement" in row["name"] or "top-1" in row["name"]]
    rungs = [rung.name for rung in small.bounds.rungs]
    assert "R3 share of flips" not in rungs and "R3 95% quantile of the change" in rungs
    # The layers matter unequally, and a probe of their effect sees it.
    kept = {group["name"]: group["kept"] for group in small.report["groups"]}
    assert len(kept) == 2 and kept["layers.0"] > kept["layers.2"] + 8


def test_a_regression_is_healed_towards_its_original() -> None:
    net, items = Scorer(), torch.randn(1500, 12, generator=torch.Generator().manual_seed(4))
    small = modhifi.prune(net, items, ratio=0.7, **AMOUNTS)
    more = {"steps": 200, "batch_size": 64, "method": {"learning_rate": 1e-3}}
    healed = modhifi.heal(small.model, items, against=net, **more, **{**AMOUNTS, "samples": 1400})
    (row,) = [row for row in healed.report["before_after"] if "variance kept" in row["name"]]
    assert row["before"] == 1 and row["after"] > row["between"] + 0.02 and healed.report["healing"]["precision"] == "no"
    curve = healed.report["healing"]["curve"]
    assert curve[0]["agreement"] is None and curve[-1]["divergence"] < curve[0]["divergence"]


def test_classes_are_not_counted_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(modhifi.ModhifiError, match="--max-flip counts changed classes"):
        modhifi.prune(Scorer(), ITEMS, ratio=0.5, **{**AMOUNTS, "checks": {"max_flip": 0.1}})
    bert("ForSequenceClassification", num_labels=1).save_pretrained(tmp_path / "reranker")
    result = CliRunner().invoke(
        app, ["prune", str(tmp_path / "reranker"), "--ratio", "0.5", "--dry-run", "--max-flip", "0.1"]
    )
    assert result.exit_code == 2 and "use --max-error" in result.stderr and result.stderr.count("\n") <= 3


def test_a_comparison_of_regressions_has_the_variance_as_its_quality() -> None:
    compared = modhifi.compare(Scorer(), ITEMS, ratio=[0.3], samples=96, evaluation_samples=64).report["comparison"]
    assert compared["quality"].endswith("(R²)")
    assert all(cell["quality"] == cell["explained"] < 1 for cell in compared["cells"])


class Series(nn.Module):
    """Eight steps of two values, from a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(12, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x).relu()).view(-1, 8, 2)


def explained(wanted: Tensor, got: Tensor) -> float:
    """R² of rows, by the book."""
    before, after = wanted.reshape(-1, wanted.shape[-1]).double(), got.reshape(-1, wanted.shape[-1]).double()
    return 1 - float((after - before).square().sum() / (before - before.mean(0)).square().sum())


def test_the_variance_kept_is_that_of_all_held_out_rows_and_of_each_source() -> None:
    net, other = Series().eval(), Series().eval()
    with torch.no_grad():
        other.out.weight *= 0.8
    loaded = load_model(net, example=ITEMS[:2], values=True)
    scales = torch.linspace(0.1, 6, 120)[:, None]  # the first say nothing of the rest
    parts = {"a": ITEMS[:60] * scales[:60], "b": ITEMS[60:120] * scales[60:]}
    samples = {name: from_items(part, None, n=60, seed=0) for name, part in parts.items()}
    held = mixed([(name, 0.5, part) for name, part in samples.items()])
    errors = measure_errors(loaded, other, held, tabulate(loaded, other, held, 7), 7)
    with torch.no_grad():
        both = {name: [model(part) for model in (net, other)] for name, part in parts.items()}
    whole = [torch.cat(outputs) for outputs in zip(*both.values(), strict=True)]
    assert errors["explained"] == pytest.approx(explained(*whole), rel=1e-6)
    assert {e["source"]: e["explained"] for e in errors["sources"]} == {
        name: pytest.approx(explained(*pair), rel=1e-6) for name, pair in both.items()
    }
    assert not {"agreement", "kl", "total_variation", "accuracy_before"} & errors.keys()


def test_the_loss_does_not_depend_on_how_items_are_batched() -> None:
    loaded = load_model(Scorer(), example=ITEMS[:2])
    student = Scorer()
    with torch.no_grad():
        student.layers[0].weight *= 0.9
    samples = from_items(ITEMS, None, n=33, seed=0)
    inputs = torch.stack([samples.load(i) for i in range(33)])
    with torch.no_grad():
        wanted, got = loaded.model(inputs), student(inputs)
    for size in (1, 2, 32, 33):
        figures = Examination(loaded, samples, size, ()).figures(student)
        assert figures["divergence"] == pytest.approx(1 - explained(wanted[:, None], got[:, None]), rel=1e-3)


def test_what_was_loaded_as_values_stays_so(tmp_path: Path) -> None:
    save_for_hf(
        resnet(), tmp_path / "model", model_args={"num_classes": 5, "channels": (8, 12, 16, 16), "stem_width": 8}
    )
    images = torch.randn(24, 3, 32, 32)
    loaded = load_model(tmp_path / "model", values=True)
    amounts: dict[str, Any] = {"samples": 12, "evaluation_samples": 8, "checks": {"walked": 0}}
    modhifi.prune(loaded, images, ratio=0.3, out=tmp_path / "small", **amounts)
    healed = modhifi.heal(tmp_path / "small", images, steps=1, out=tmp_path / "healed", **amounts)
    assert healed.report["before_after"][0]["name"].endswith("(R²)")
    for directory in ("small", "healed"):
        assert load_model(tmp_path / directory).gives_values
        with pytest.raises(modhifi.ModhifiError, match="--max-flip counts"):
            modhifi.verify(tmp_path / directory, torch.randn(8, 3, 32, 32), max_flip=0.5)
    with pytest.raises(modhifi.ModhifiError, match="language model"):
        load_model(tiny_text.llama(), values=True)


def test_labels_of_values_are_no_classes() -> None:
    items = [(item, float(number)) for number, item in enumerate(ITEMS)]
    given = {"samples": 64, "evaluation_samples": 32}
    assert modhifi.compare(Scorer(), items, ratio=[0.3], **given).report["comparison"]["quality"].endswith("(R²)")


def test_an_outcome_is_told_where_values_do_not_vary() -> None:
    small = modhifi.prune(Scorer(), ITEMS, ratio=0.3, **{**AMOUNTS, "evaluation_samples": 1})
    assert small.report["outcome"]["text"].startswith("The outputs do not vary on 1 held-out")


def test_values_that_do_not_vary_have_no_share_of_variance() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1] * 0 + 2

    loaded = load_model(Constant(), example=ITEMS[:2])
    held = from_items(ITEMS, None, n=8, seed=0)
    assert tabulate(loaded, loaded.model, held, 4).explained is None
