"""Models that read several inputs: tuples by position, mappings by name, nests; from Python as items."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import conv_bn
from torch import Tensor, nn

import modhifi
from modhifi.data.in_memory import several_inputs
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.loaded import main_output
from modhifi.models.packing import Packing, pack_batch
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import find_structure

N = 40
PIXELS = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(N, 4, generator=torch.Generator().manual_seed(1))
STEPS = torch.arange(N) % 7


class Two(nn.Module):
    """Reads pixels and a vector, and a step where one is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = conv_bn(3, 8), conv_bn(8, 8)
        self.vector, self.step, self.head = nn.Linear(4, 12), nn.Embedding(7, 12), nn.Linear(8 + 12, 5)

    def forward(self, image: Tensor, vector: Tensor, step: Tensor | None = None) -> Tensor:
        pooled, hidden = self.inner(self.stem(image)).mean((2, 3)), self.vector(vector)
        hidden = hidden if step is None else hidden + self.step(step)
        return self.head(torch.cat([pooled, F.relu(hidden)], 1))


class OfOne(Two):
    """Takes all inputs as one argument."""

    def __init__(self, read: Callable[[Any], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.read = read

    def forward(self, batch: Any) -> Tensor:
        return super().forward(*self.read(batch))


def rows(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*tensors, strict=True))


CASES: dict[str, tuple[Callable[[], nn.Module], list[Any], Callable[[nn.Module], Tensor]]] = {
    "tuples": (Two, rows(PIXELS, VECTORS), lambda net: net(PIXELS, VECTORS)),
    "three": (Two, rows(PIXELS, VECTORS, STEPS), lambda net: net(PIXELS, VECTORS, STEPS)),
    "by name": (
        Two,
        [{"vector": v, "image": x, "step": t} for x, v, t in rows(PIXELS, VECTORS, STEPS)],
        lambda net: net(PIXELS, VECTORS, STEPS),
    ),
    "one mapping": (
        lambda: OfOne(lambda batch: (batch["x"], batch["v"])),
        [{"x": x, "v": v} for x, v in rows(PIXELS, VECTORS)],
        lambda net: net({"x": PIXELS, "v": VECTORS}),
    ),
    "nest": (
        lambda: OfOne(lambda batch: (batch["x"], *batch["more"])),
        [{"x": x, "more": [v, t]} for x, v, t in rows(PIXELS, VECTORS, STEPS)],
        lambda net: net({"x": PIXELS, "more": [VECTORS, STEPS]}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_items_reach_the_model_as_it_takes_them(case: str) -> None:
    torch.manual_seed(0)
    make, items, run = CASES[case]
    net = make().eval()
    batch = several_inputs(items)
    loaded = modhifi.load_model(net, example=batch)
    samples = load_samples(items, loaded, n=N)
    (packed,) = samples.batches(N)
    order = [int(name.split()[-1]) for name in samples.names]
    with torch.no_grad():
        assert torch.equal(loaded.logits(packed), run(net)[order])
    assert {"stem.0"} <= {g.name for g in find_structure(loaded).prunable}


def test_several_inputs_are_pruned_measured_saved_and_verified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, items, run = CASES["nest"]
    net = make().eval()
    more: dict[str, Any] = dict(samples=24, evaluation_samples=16, batch_size=8, checks={"walked": 2})
    small = modhifi.prune(net, items, ratio=0.5, out=tmp_path / "small", **more)
    before, after = small.report["size"]["flops"]
    assert after < before
    assert next(r for r in small.bounds.rungs if r.name.startswith("R4")).value > 0
    again = modhifi.load(tmp_path / "small", skeleton=net)
    with torch.no_grad():
        assert torch.equal(run(again), run(small.model))
        change = (run(small.model) - run(net)).norm(dim=1)
    report = modhifi.verify(small.model, items, against=net, samples=N, walked=0)
    assert report.statistical.n == N
    assert report.statistical.error_quantile.measured == pytest.approx(float(change.double().quantile(0.95)), rel=1e-4)


class Flat(nn.Module):
    """Reads both inputs of a :class:`Two` from one vector."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :192].reshape(-1, 3, 8, 8), x[:, 192:])


def test_packed_moments_are_those_of_the_plain_inputs() -> None:
    torch.manual_seed(0)
    net = Two().eval()
    flat, budget = torch.cat([PIXELS.flatten(1), VECTORS], 1), Budget("components", 0.5)
    settings = PruneSettings(only=("*vector",), weighting="energy", batch_size=8)
    pruned = []
    for model, items, example in ((net, rows(PIXELS, VECTORS), (PIXELS[:2], VECTORS[:2])), (Flat(net), flat, flat[:2])):
        loaded = modhifi.load_model(model, example=example)
        pruned.append(prune_model(loaded, load_samples(items, loaded, n=N), budget, settings).model)
    ours, theirs = pruned[0], pruned[1].net
    assert torch.equal(ours.vector.weight, theirs.vector.weight) and len(ours.vector.weight) == 6
    assert torch.allclose(ours.head.weight, theirs.head.weight, atol=1e-6)


def test_a_classifier_of_several_inputs_forgets_and_is_audited() -> None:
    torch.manual_seed(0)
    net = Two().eval()
    with torch.no_grad():
        net.head.weight.mul_(20)
        labels = net(PIXELS.repeat(4, 1, 1, 1), VECTORS.repeat(4, 1)).argmax(1)
        items = rows(PIXELS.repeat(4, 1, 1, 1) + 0.01 * torch.randn(4 * N, 3, 8, 8), VECTORS.repeat(4, 1))
    forgotten = int(labels.mode().values)
    data = list(zip(items, labels.tolist(), strict=True))
    given: dict[str, Any] = dict(evaluate=data[::2], checks={"walked": 0})
    edited = modhifi.unlearn(net, data[1::2], forget=forgotten, method="erase", **given)
    report = modhifi.audit(edited.model, data[1::2], evaluate=data[::2], forget=forgotten, original=net)
    rows_of = report["audit"]["rows"]
    assert rows_of["edited"]["forget"] < rows_of["original"]["forget"]


@pytest.mark.slow
def test_a_model_of_transformers_takes_all_its_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    part: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)
    text, vision = part | dict(vocab_size=50, max_position_embeddings=16), part | dict(image_size=8, patch_size=4)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    ids = torch.randint(3, 50, (N, 6), generator=torch.Generator().manual_seed(0))
    items = [{"input_ids": i, "pixel_values": x} for i, x in rows(ids, PIXELS)]
    more: dict[str, Any] = dict(samples=8, evaluation_samples=4, batch_size=4, checks={"walked": 0})
    small = modhifi.prune(tmp_path / "clip", items, ratio=0.5, out=tmp_path / "small", **more)
    kinds = {g["name"].split(".")[0] for g in small.report["groups"]}
    assert kinds == {"text_model", "vision_model"}
    again = modhifi.load(tmp_path / "small")
    with torch.no_grad():
        ours, expected = (m(input_ids=ids, pixel_values=PIXELS) for m in (again, small.model))
    assert torch.equal(main_output(ours), main_output(expected))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(x, v[: 1 + i % 4]) for i, (x, v) in enumerate(rows(PIXELS, VECTORS))], "the input '1' is .* in one item"),
        ([(x, {"a": v, "b": 3}) for x, v in rows(PIXELS, VECTORS)], "the input '1.b' of an item is int"),
        ([(x, v / 0) for x, v in rows(PIXELS, VECTORS)], "the input '1' holds NaN or infinite values"),
        ([(x, [[0.5] * 300]) for x in PIXELS], "the input '1.0.0' of an item is float"),
        ([{"image": x} for x in PIXELS], "does not run on its example alone .*forward takes image, vector, step"),
        ([(x, VECTORS.numpy()) for x in PIXELS], "the label of item .* of the data is a ndarray"),
    ],
)
def test_an_error_is_one_short_line(items: list[Any], message: str) -> None:
    with pytest.raises(ModhifiError, match=message) as caught:
        modhifi.prune(Two().eval(), items, ratio=0.5)
    assert "\n" not in str(caught.value) and "tensor(" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_takes_one_input_says_so(tmp_path: Path) -> None:
    loaded = modhifi.load_model(Two().eval(), example=(PIXELS[:2], VECTORS[:2]))
    with pytest.raises(ModhifiError, match="no source has samples for a model of several inputs"):
        modhifi.prune(loaded, "synthetic", ratio=0.5)
    with pytest.raises(ModhifiError, match="has one input, and this model reads several"):
        modhifi.prune(loaded, rows(PIXELS, VECTORS), ratio=0.5, export=["pt2"], out=tmp_path / "out")
    with pytest.raises(ModhifiError, match=r"2 \(0\), 3 \(1\) items; give every input with the batch on axis 0"):
        modhifi.load_model(Two().eval(), example=(PIXELS[:2], VECTORS[:3]))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def test_packing_keeps_every_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {str(t): (torch.randn(2, 3, generator=generator) * 3).to(t) for t in DTYPES}
    batch["nest"] = (torch.arange(2), {"scalar": torch.tensor([1.5, 2.5])})
    packing, packed = pack_batch(batch)
    assert packed.dtype == torch.uint8 and len(packed) == 2
    back = Packing.from_json(packing.to_json()).nest(packed)
    assert all(torch.equal(back[str(t)], batch[str(t)]) for t in DTYPES)
    assert torch.equal(back["nest"][0], torch.arange(2)) and torch.equal(
        back["nest"][1]["scalar"], batch["nest"][1]["scalar"]
    )
    with pytest.raises(ModhifiError, match="broken"):
        Packing.from_json({"form": [None], "shapes": [[1]], "dtypes": ["nothing"]})
