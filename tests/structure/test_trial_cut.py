from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MT5Config, MT5Model
from transformers.modeling_outputs import ImageClassifierOutput

from modhifi.models.load import load_model
from modhifi.pruning.stages import find_structure
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import FIXED, confirm


class ByHeart(nn.Module):
    """The classic beginner's net: a reshape that knows its width by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.hidden, self.head = nn.Linear(8 * 9, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.two(F.relu(self.one(x)))), 2)
        return self.head(F.relu(self.hidden(x.view(-1, 8 * 9))))


class Silent(tiny.Net):
    """Does not fail on another width, but divides by the one it knows."""

    def __init__(self) -> None:
        super().__init__(6)
        self.inner, self.conv = tiny.conv_bn(8, 8), tiny.conv_bn(8, 6)

    def body(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.conv(x * (2.0 if x.shape[1] == 8 else 1.0))


def both(model: nn.Module, x: Tensor) -> tuple[Structure, Structure]:
    def run(model: nn.Module) -> Any:
        return model(x)

    traced = trace(model, run)
    return traced, confirm(model, traced, run)


@pytest.mark.parametrize(
    "build, wrong, right",
    [(ByHeart, {"two"}, {"one", "hidden"}), (Silent, {"inner.0"}, {"stem.0", "conv.0"})],
)
def test_widths_known_by_heart_are_found(build: Callable[[], nn.Module], wrong: set[str], right: set[str]):
    torch.manual_seed(0)
    traced, confirmed = both(tiny.randomise(build()), torch.randn(2, 3, 10, 10))
    assert {g.name for g in traced.prunable} == wrong | right
    assert {g.name for g in confirmed.prunable} == right
    assert {g.name for g in confirmed.refused if g.refused == FIXED} == wrong


@pytest.mark.parametrize("name", ["grouped", "halves", "gate", "flat"])
def test_what_can_be_cut_stays_as_it_was(name: str):
    model, x = tiny.pattern(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    traced, confirmed = both(model.float(), x.float())
    assert confirmed is traced and traced.prunable
    assert all(torch.equal(value, before[key].float()) for key, value in model.state_dict().items())


def test_where_all_is_well_two_unequal_cuts_are_enough():
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))), torch.randn(2, 8)
    widths: list[tuple[int, ...]] = []

    def run(model: nn.Module) -> Any:
        widths.append(tuple(layer.out_features for layer in model))
        return model(x)

    traced = trace(model, run)
    widths.clear()
    assert confirm(model, traced, run) is traced and len(traced.prunable) == 4
    # Masked and cut in turn; what loses one component in the first trial keeps 60 % in the second.
    assert widths == [(8,) * 5, (7, 4, 7, 4, 8), (8,) * 5, (4, 7, 4, 7, 8)]


def test_a_model_of_nans_is_not_blamed_on_its_code():
    model, x = tiny.pattern("plain")
    model.stem[0].weight.data.fill_(float("nan"))
    traced, confirmed = both(model, x)
    assert confirmed is traced


@dataclass
class Pair:
    first: Tensor
    second: list[Tensor]


class Fields(NamedTuple):
    first: Tensor
    second: Tensor


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "tuple": (lambda a, b: (a, b), "1"),
    "list": (lambda a, b: [a, b], "1"),
    "named tuple": (Fields, "second"),
    "dict": (lambda a, b: {"logits": a, "aux": b}, "aux"),
    "nest": (lambda a, b: {"logits": a, "more": [None, (b,)]}, "more.1.0"),
    "dataclass": (lambda a, b: Pair(a, [b]), "second.0"),
    "dataclass in a tuple": (lambda a, b: (a, Pair(a, [a, b])), "1.second.1"),
    "model output": (lambda a, b: ImageClassifierOutput(logits=a, hidden_states=(a, b)), "hidden_states.1"),
    "object": (lambda a, b: SimpleNamespace(logits=a, aux=b), "aux"),
}


class Second(nn.Module):
    """Its second output is divided by a width of the model."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form, self.stem = form, tiny.conv_bn(3, 8)
        self.inner, self.b, self.v = tiny.conv_bn(8, 8), tiny.conv(8, 5), tiny.conv(8, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.inner(self.stem(x))
        return self.form(self.b(h).mean((2, 3)), self.v(h).mean((2, 3)) / h.shape[1] ** 0.5)


@pytest.mark.parametrize("form", FORMS)
def test_every_output_is_compared(form: str):
    torch.manual_seed(0)
    build, name = FORMS[form]
    model, x = tiny.randomise(Second(build)), torch.randn(2, 3, 10, 10)
    loaded = load_model(model, example=x)
    direct, (_, confirmed) = find_structure(loaded), both(model, x)
    for structure in (direct, confirmed):
        assert {g.name for g in structure.prunable} == {"stem.0"}
        (wrong,) = (g for g in structure.groups if g.name == "inner.0")
        assert wrong.refused == f"{FIXED} (output '{name}')"
    assert name in loaded.outputs(x)


class Handed(tiny.Net):
    """Hands out the features beside the scores: they must stay."""

    def __init__(self) -> None:
        super().__init__(6)
        self.inner, self.conv = tiny.conv_bn(8, 8), tiny.conv_bn(8, 6)

    def forward(self, x: Tensor) -> Any:
        features = self.conv(self.inner(self.stem(x)))
        return self.head(features.mean((2, 3))), {"features": features}


def test_channels_of_a_second_output_stay():
    torch.manual_seed(0)
    loaded = load_model(tiny.randomise(Handed()), example=torch.randn(2, 3, 10, 10))
    structure = find_structure(loaded)
    assert {g.name for g in structure.prunable} == {"stem.0", "inner.0"}
    assert next(g for g in structure.groups if g.name == "conv.0").refused == "these channels are the model's output"


class UpToAPoint(tiny.Net):
    """Goes with one channel less, but not with few."""

    def __init__(self) -> None:
        super().__init__(6)
        self.inner, self.conv = tiny.conv_bn(8, 8), tiny.conv_bn(8, 6)

    def body(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.conv(x * (2.0 if x.shape[1] > 5 else 1.0))


def test_widths_that_go_wrong_only_in_deep_cuts_are_found():
    torch.manual_seed(0)
    traced, confirmed = both(tiny.randomise(UpToAPoint()), torch.randn(2, 3, 10, 10))
    assert {g.name for g in traced.prunable} - {g.name for g in confirmed.prunable} == {"inner.0"}


class Travels(nn.Module):
    """Blocks that add a tensor whose width the first one makes for all."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(6, 8) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        shared = None
        for up, down in zip(self.up, self.down, strict=True):
            hidden = up(x)
            shared = torch.zeros(hidden.shape[-1]) if shared is None else shared
            x = x + down((hidden + shared).relu())
        return self.head(x)


def mt5() -> nn.Module:
    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    return MT5Model(MT5Config(**sizes))


@pytest.mark.parametrize(
    ("build", "x", "run", "tied", "right"),
    [
        (Travels, torch.randn(2, 6), lambda net, x: net(x), ["up.0", "up.1", "up.2"], set()),
        (
            mt5,
            torch.randint(3, 50, (2, 6)),
            lambda net, x: net(x, decoder_input_ids=x).last_hidden_state,
            [f"decoder.block.{i}.layer.1.EncDecAttention.q" for i in range(2)],
            {f"{part}.DenseReluDense.wi_0" for part in ("encoder.block.0.layer.1", "decoder.block.1.layer.2")},
        ),
    ],
)
def test_widths_that_blocks_share_become_one_group(build: Any, x: Tensor, run: Any, tied: list[str], right: set[str]):
    torch.manual_seed(0)
    model = build().eval()
    confirmed = confirm(model, trace(model, lambda m: run(m, x)), lambda m: run(m, x))
    groups = {g.name: g for g in confirmed.prunable}
    assert not set(tied[1:]) & {g.name for g in confirmed.groups}
    assert set(tied) <= {s.module for s in groups[tied[0]].producers}
    assert right <= groups.keys()
    plan = Plan({tied[0]: (0, 2)})
    small, masked = shrink(copy.deepcopy(model), confirmed, plan), mask_readers(model, confirmed, plan)
    torch.testing.assert_close(run(small, x), run(masked, x))
    assert sizes_of(model, confirmed).macs({g.name: g.n for g in confirmed.prunable} | {tied[0]: 2}) < confirmed.macs


class Draws(nn.Module):
    """A net that drops a part of its input at random in every pass, as some models mask patches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x * (torch.rand_like(x) > 0.5)).relu())
        return out


def test_a_model_that_draws_is_compared_on_the_same_draws() -> None:
    torch.manual_seed(0)
    _, confirmed = both(Draws().eval(), torch.randn(2, 6))
    assert [g.name for g in confirmed.prunable] == ["up"]


class Sensitive(nn.Module):
    """Small differences of the width's sum grow to large ones of the output, as in tens of blocks."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.up, self.down, self.counts = nn.Linear(8, 256), nn.Linear(256, 8), counts

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        x = self.down(x) * (x.shape[-1] if self.counts else 1)
        for _ in range(4):
            x = torch.sin(12 * x)
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_that_counts_on_a_width_is_told_from_rounding_that_grows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, dtype=dtype)
    for counts in (False, True):
        model = Sensitive(counts).to(dtype).eval()
        structure = confirm(model, trace(model, lambda m: m(x)), lambda m: m(x))
        assert ([g.name for g in structure.prunable] == ["up"]) is not counts


def test_memory_that_is_too_small_for_a_trial_is_no_fault_of_the_model() -> None:
    model = nn.Sequential(tiny.conv_bn(3, 8), tiny.conv_bn(8, 6)).eval()
    x = torch.randn(2, 3, 8, 8)
    structure = trace(model, lambda m: m(x))

    def run(tried: nn.Module) -> Tensor:
        if sum(p.numel() for p in tried.parameters()) < sum(p.numel() for p in model.parameters()):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return tried(x)

    with pytest.raises(RuntimeError, match="allocate"):
        confirm(model, structure, run)
