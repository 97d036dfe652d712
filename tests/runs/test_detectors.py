"""Detectors: outputs whose entries are a list an image, and whose number is the model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torchvision
from tiny import conv_bn
from tiny_yolo import Boxes, Yolo
from torch import Tensor, nn

import modhifi
from modhifi.errors import ModhifiError
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink
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


def lively(net: nn.Module) -> nn.Module:
    """Statistics, scales and shifts that make nothing trivially zero."""
    return tiny.randomise(net)


@pytest.mark.parametrize("up", ["nearest", "transposed", "shuffle"])
@torch.no_grad()
def test_every_part_of_a_yolo_of_plain_modules_can_be_cut(up: str) -> None:
    torch.manual_seed(0)
    net, x = lively(Yolo(up)).double(), PIXELS.double()[:2].repeat(1, 1, 4, 4)
    structure = trace(net, lambda m: m(x))
    assert {g.name for g in structure.refused} == {"heads.0.1"}  # of both heads, what it returns
    plan = Plan({g.name: tuple(range(0, g.n, 2)) for g in structure.prunable})
    masked, small = mask_readers(net, structure, plan)(x), shrink(copy.deepcopy(net), structure, plan)
    assert (masked - net(x)).norm() > 1e-3 * masked.norm()
    assert (small(x) - masked).norm() <= 1e-9 * masked.norm()
    assert small.fine.c == 4 and small.one[1].cv1.conv.out_channels == 8


@pytest.mark.slow
def test_a_yolo_is_pruned_its_boxes_compared_and_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = PIXELS.repeat(1, 1, 4, 4)
    more: dict[str, Any] = dict(samples=16, evaluation_samples=8, batch_size=8, checks={"walked": 0})
    boxes = modhifi.prune(lively(Boxes("transposed")), x, ratio=0.3, **more)
    (row,) = [r for r in boxes.report["before_after"] if "box overlap" in r["name"]]
    assert 0 < row["after"] < 1
    small = modhifi.prune(lively(Yolo("shuffle")), x, ratio=0.3, out=tmp_path / "small", export=["onnx"], **more)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "small" / "model.onnx", providers=["CPUExecutionProvider"])
    (ours,) = session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(ours), small.model(x[:2]), rtol=1e-3, atol=1e-4)
    again = modhifi.load(tmp_path / "small", skeleton=Yolo("shuffle"))
    with torch.no_grad():
        assert torch.equal(again(x), small.model(x))


TORCHVISION: dict[str, tuple[str, int]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("roi_heads.box_head.fc6", 30),
    "ssdlite320_mobilenet_v3_large": ("backbone.features.0.0.0", 30),
    "retinanet_resnet50_fpn": ("backbone.body.layer1.0.conv1", 40),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_detectors_of_torchvision_are_pruned_and_their_boxes_compared(name: str) -> None:
    torch.manual_seed(0)
    group, count = TORCHVISION[name]
    size: dict[str, Any] = {} if name.startswith("ssd") else dict(min_size=64, max_size=64)
    build = getattr(torchvision.models.detection, name)
    net = build(weights=None, weights_backbone=None, num_classes=5, **size).eval()
    x = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    more: dict[str, Any] = dict(samples=8, evaluation_samples=4, batch_size=4)
    small = modhifi.prune(net, x, ratio=0.3, **more)
    names = {g["name"] for g in small.report["groups"]}
    assert group in names and len(names) >= count
    rows = {r["name"]: r for r in small.report["before_after"]}
    assert rows["parameters"]["after"] < 0.8 * rows["parameters"]["before"]
    assert 0 <= rows["box overlap (IoU) with the original"]["after"] <= 1
