"""Detectors: outputs whose entries are a list an image, and whose number is the model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import conv_bn
from torch import Tensor, nn

import modhifi
from modhifi.errors import ModhifiError
from modhifi.structure.tracing.tracer import trace

PIXELS = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAMES = ("boxes", "scores", "labels")


@dataclass
class Found:
    boxes: Tensor
    scores: Tensor
    labels: Tensor


FORMS: dict[str, Callable[[list[tuple[Tensor, ...]]], Any]] = {
    "dicts": lambda found: [dict(zip(NAMES, one, strict=True)) for one in found],
    "dataclasses": lambda found: tuple(Found(*one) for one in found),
    "concatenated": lambda found: {name: torch.cat([one[i] for one in found]) for i, name in enumerate(NAMES)},
}


class Detector(nn.Module):
    """A box in every cell whose score is above the image's mean: their number varies from image to image."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.anchors = FORMS[form], [torch.ones(4)]  # kept as torchvision keeps them
        self.stem, self.inner, self.head = conv_bn(3, 8), conv_bn(8, 8), nn.Conv2d(8, 5 + 4, 1)

    def forward(self, images: Tensor) -> Any:
        maps = self.head(self.inner(self.stem(images))).flatten(2).transpose(1, 2)
        found = []
        for rows in maps:
            scores, labels = rows[:, :5].max(1)
            chosen = scores > scores.mean()
            found.append((rows[chosen, 5:] + self.anchors[0], scores[chosen], labels[chosen]))
        return self.form(found)


@pytest.mark.parametrize("form", FORMS)
def test_detectors_are_pruned_and_counted(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Detector(form).eval()
    more: dict[str, Any] = dict(samples=16, evaluation_samples=8, batch_size=8)
    small = modhifi.prune(net, PIXELS, ratio=0.5, out=tmp_path / "small", **more)
    report = small.report
    assert small.bounds is None and "agreement" not in report["errors"]
    (verdict,) = [v for v in report["verdicts"] if v["verdict"] == "not available"]
    assert "one entry an item (boxes, scores, labels)" in verdict["text"] or "rows for two items" in verdict["text"]
    rows = {row["name"]: row for row in report["before_after"]}
    with torch.no_grad():
        entries = [len(one["boxes"]) for one in Detector.forward(_as_dicts(net), PIXELS)]
    assert min(entries) <= rows["boxes an item"]["before"] <= max(entries)
    assert rows["parameters"]["after"] < rows["parameters"]["before"]
    assert any("weighted by their own energy" in warning for warning in report["warnings"])
    again = modhifi.load(tmp_path / "small", skeleton=net)
    with torch.no_grad():
        ours, expected = (_as_dicts(m)(PIXELS) for m in (again, small.model))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(ours, expected, strict=True) for name in NAMES)
    assert "boxes an item" in (tmp_path / "small" / "report.html").read_text()


def _as_dicts(net: Any) -> Any:
    net.form = FORMS["dicts"]
    return net


def test_what_would_compare_outputs_is_refused_before_the_work() -> None:
    net = Detector("dicts").eval()
    with pytest.raises(ModhifiError, match="no tolerance can be checked: the model returns a list with one entry"):
        modhifi.prune(net, PIXELS, ratio=0.5, checks={"max_flip": 0.1})
    with pytest.raises(ModhifiError, match="no bound is available: the model returns a list"):
        modhifi.verify(Detector("dicts").eval(), PIXELS, against=net)
    with pytest.raises(ModhifiError, match="no class to forget"):
        modhifi.unlearn(net, PIXELS, forget=1)


class Anchored(nn.Module):
    """Keeps tensors as plain attributes, in a list, and as a mapping's value."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        self.shift, self.more = [torch.ones(5)], {"scale": torch.ones(5)}

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) * self.more["scale"] + self.shift[0]


def test_tensors_that_modules_keep_as_attributes_are_fixed() -> None:
    net, x = Anchored().eval(), torch.randn(2, 6)
    assert {g.name for g in trace(net, lambda m: m(x)).prunable} == {"up"}


class Squeezed(nn.Module):
    """Drops every axis of one, that of a single item too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 8), nn.Conv2d(8, 5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x)).squeeze()


def test_outputs_with_a_row_an_item_can_be_compared() -> None:
    assert modhifi.load_model(Squeezed().eval(), example=PIXELS[:2]).incomparable() == ""
    assert modhifi.load_model(Detector("dicts").eval(), example=PIXELS[:1]).incomparable() != ""
