from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.structure.expand import expand
from modhifi.structure.groups import Group, Structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import confirm


def structure_of(name: str) -> Structure:
    model, x = tiny.pattern(name)
    return trace(model, lambda model: model(x))


def group(structure: Structure, name: str) -> Group:
    return next(g for g in structure.groups if g.name == name)


def places(found: Group) -> dict[str, list[str]]:
    return {role: [s.module for s in found.of(role)] for role in ("producer", "along", "reader")}  # type: ignore


def test_plain_chain():
    structure = structure_of("plain")
    assert places(group(structure, "stem.0")) == dict(producer=["stem.0"], along=["stem.1"], reader=["conv.0"])
    assert places(group(structure, "conv.0")) == dict(producer=["conv.0"], along=["conv.1"], reader=["head"])
    assert [g.n for g in structure.prunable] == [8, 6]
    assert [(g.name, g.refused) for g in structure.refused] == [("head", "these channels are the model's output")]


def test_multiply_adds_count_one_sample_and_tell_where_the_mean_goes():
    operators = structure_of("plain").operators
    assert {name: o.macs for name, o in operators.items()} == {
        "stem.0": 12 * 12 * 3 * 9 * 8,
        "conv.0": 6 * 6 * 8 * 9 * 6,
        "head": 6 * 5,
    }
    assert {name: o.sink for name, o in operators.items()} == {"stem.0": "stem.1", "conv.0": "conv.1", "head": "bias"}


def test_residual_width_is_one_group():
    structure = structure_of("residual")
    wide = group(structure, "stem.0")
    assert places(wide) == dict(
        producer=["stem.0", "second.0"], along=["stem.1", "second.1"], reader=["first.0", "head"]
    )
    assert wide.coupled and not group(structure, "first.0").coupled


@pytest.mark.parametrize("name, multiplier", [("depthwise", 1), ("depthwise x2", 2)])
def test_depthwise_convolutions_are_passed_along(name: str, multiplier: int):
    found = group(structure_of(name), "stem.0")
    assert places(found) == dict(
        producer=["stem.0"], along=["stem.1", "depthwise.0", "depthwise.1"], reader=["point.0"]
    )
    expected = torch.arange(8 * multiplier).view(8, multiplier)
    assert torch.equal(found.readers[0].index, expected)


def test_grouped_convolutions_ask_for_equal_parts():
    structure = structure_of("grouped")
    parts = torch.arange(3).repeat_interleave(4)
    for name in ("inner.0", "grouped.0"):
        found = group(structure, name)
        assert found.refused is None and found.step == 3
        assert torch.equal(found.partition, parts)


def test_gates_couple_what_they_multiply():
    structure = structure_of("gate")
    assert places(group(structure, "stem.0")) == dict(
        producer=["stem.0", "expand"], along=["stem.1"], reader=["reduce", "conv.0"]
    )
    assert places(group(structure, "reduce"))["reader"] == ["expand"]


def test_concatenations_shift_positions():
    structure = structure_of("dense")
    assert places(group(structure, "stem.0"))["reader"] == ["one.0", "two.0", "three.0"]
    at = {s.module: s.index.flatten().tolist() for s in group(structure, "one.0").readers}
    assert at == {"two.0": [8, 9, 10, 11], "three.0": [11, 12, 13, 14]}  # the image stands first in the second one


@pytest.mark.parametrize("name", ["flat", "viewed"])
def test_flattening_gives_every_channel_its_pixels(name: str):
    found = group(structure_of(name), "stem.0").readers[0]
    assert found.module == "hidden"
    assert torch.equal(found.index, torch.arange(72).view(8, 9))


def test_chunks():
    paired = group(structure_of("glu"), "both.0")
    assert paired.n == 6 and paired.partition is None
    assert torch.equal(paired.producers[0].index, torch.stack([torch.arange(6), torch.arange(6, 12)], 1))
    apart = group(structure_of("halves"), "both.0")
    assert apart.n == 12 and torch.equal(apart.partition, torch.arange(2).repeat_interleave(6))


def test_parameters_on_the_channel_axis():
    assert "scale" in places(group(structure_of("layer scale"), "stem.0"))["along"]
    assert places(group(structure_of("prelu"), "stem.0"))["along"] == ["stem.1", "act.weight"]


class Kept(tiny.Net):
    """Keeps an index, or a scale, that its first pass has made."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__(6)
        self.kind, self.kept = kind, []
        self.inner, self.conv = tiny.conv_bn(8, 8), tiny.conv_bn(8, 6)

    def body(self, x):
        if not self.kept:
            self.kept.append(torch.ones(x.shape[-1], device=x.device).to(self.kind))
        return self.conv(self.inner(x) * (self.kept[0] > 0))


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_tensors_kept_from_an_earlier_pass_carry_no_components(kind):
    model, x = tiny.randomise(Kept(kind)), torch.randn(2, 3, 10, 10)
    model(x)
    assert {g.name for g in trace(model, lambda model: model(x)).prunable} == {"stem.0", "inner.0", "conv.0"}


@cache
def heights(count: int) -> Tensor:
    return torch.linspace(0, 1, count)[:, None]


def test_tensors_of_a_library_cache_carry_no_components():
    model, x = tiny.randomise(Through(lambda x: x + heights(x.shape[2]))), torch.randn(2, 3, 12, 12)
    model(x)
    assert group(trace(model, lambda model: model(x)), "inner").refused is None


def test_a_layer_called_twice_ties_its_input_to_its_output():
    structure = structure_of("twice")
    assert places(group(structure, "stem.0"))["producer"] == ["stem.0", "shared"]
    assert structure.operators["shared"].sink is None  # two BatchNorms stand behind it


@pytest.mark.parametrize(
    "name, refused, reason",
    [
        ("group norm of all", "stem.0", "a GroupNorm normalises across these channels (norm)"),
        ("layer norm", "stem", "a LayerNorm normalises across these channels (norm)"),
        ("shuffle", "first.0", "a single component, or one in each part, cannot be removed"),
        ("running sum", "inner.0", "'cumsum' runs across these channels"),
        ("roll", "inner.0", "'roll' takes these channels from fixed places"),
        ("reordered", "inner.0", "'__getitem__' takes these channels from fixed places"),
        ("split", "inner.0", "'split' takes these channels from fixed places"),
        ("power", "inner.0", "the operation 'pow' is not understood"),
        ("tied", "stem", "the weight is shared with another layer"),
        ("assigned", "inner.0", "'__getitem__' takes these channels from fixed places"),
        ("own forward", "inner.0", "the weight of conv is used outside that layer"),
    ],
)
def test_what_is_refused_and_that_the_rest_is_not(name: str, refused: str, reason: str):
    structure = structure_of(name)
    assert reason in str(group(structure, refused).refused)
    others = {g.name.partition("#")[0] for g in structure.refused if g.slices} - {refused, "head"}
    assert not others
    assert structure.prunable or name == "tied"


def test_layers_that_cannot_be_edited_are_listed_with_the_reason():
    assert group(structure_of("own forward"), "conv").refused == "the weight of conv is used outside that layer"


def test_a_batchnorm_takes_the_mean_only_where_it_alone_reads():
    class Peek(tiny.Plain):
        def body(self, x: Tensor) -> Tensor:
            raw = self.conv[0](x)
            return torch.relu(self.conv[1](raw)) + raw

    model, x = tiny.randomise(Peek()), torch.randn(2, 3, 12, 12)
    assert trace(model, lambda model: model(x)).operators["conv.0"].sink is None


def test_one_batchnorm_behind_two_convolutions_takes_no_mean():
    class Sharing(tiny.Net):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = tiny.conv(8, 8), tiny.conv(8, 8), nn.BatchNorm2d(8)

        def body(self, x: Tensor) -> Tensor:
            return self.norm(self.two(torch.relu(self.norm(self.one(x)))))

    model, x = tiny.randomise(Sharing()), torch.randn(2, 3, 12, 12)
    operators = trace(model, lambda model: model(x)).operators
    assert operators["one"].sink is None and operators["two"].sink is None


def test_adding_channels_of_the_input_keeps_them_all():
    class Skip(tiny.Net):
        """The image takes part in a sum through a concatenation."""

        def __init__(self) -> None:
            super().__init__()
            self.five, self.conv = tiny.conv_bn(8, 5), tiny.conv_bn(8, 8)

        def forward(self, image: Tensor) -> Tensor:
            x = self.stem(image)
            return self.head((self.conv(x) + torch.cat([image, self.five(x)], 1)).mean((2, 3)))

    model, x = tiny.randomise(Skip()), torch.randn(2, 3, 12, 12)
    structure = trace(model, lambda model: model(x))
    stay, free = group(structure, "conv.0"), group(structure, "conv.0#2")  # one convolution, two fates
    assert stay.n == 3 and "combined with channels that must stay" in str(stay.refused)
    assert free.n == 5 and free.refused is None and places(free)["producer"] == ["conv.0", "five.0"]


def test_nothing_is_changed_and_no_hook_is_left():
    model, x = tiny.pattern("gate")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(x)
    trace(model, lambda model: model(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["mixnet_s", "convnext_atto"])
def test_refusals_of_real_architectures_name_the_operation(name: str):
    model, x = tiny.architecture(name)
    structure = trace(model, lambda model: model(x))
    reasons = " ".join(str(g.refused) for g in structure.refused)
    assert {"mixnet_s": "these channels are the model's output", "convnext_atto": "a LayerNorm normalises"}[
        name
    ] in reasons
    assert len(structure.prunable) >= {"mixnet_s": 50, "convnext_atto": 12}[name]


def test_pieces_of_a_split_are_groups_of_their_own():
    structure = structure_of("stored split")
    first, second = group(structure, "inner.0"), group(structure, "inner.0#2")
    assert (first.n, second.n) == (3, 5)
    assert first.pieces == (("", "sizes.0", 1),) and second.pieces == (("", "sizes.1", 1),)


def test_equal_pieces_of_different_fates_lose_the_same_channels():
    both = group(structure_of("stored equal split"), "inner.0")
    assert both.n == 4 and both.pieces == (("", "sizes", 1),)
    assert torch.equal(both.producers[0].index, torch.tensor([[i, 4 + i] for i in range(4)]))


@pytest.mark.parametrize(("name", "components"), [("group norm", 4), ("group norm without scales", 4)])
def test_channels_that_are_normalised_together_are_one_component(name: str, components: int):
    assert group(structure_of(name), "stem.0").n == components


def test_the_heads_of_multihead_attention_stay_and_say_why():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(16, 5)).eval()
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        structure = trace(model, lambda model: model(x))
    assert [g.name for g in structure.prunable] == ["0.linear1"]
    assert "its heads stay" in str(group(structure, "0.self_attn.out_proj").refused)


class Through(tiny.Net):
    """One operation between two convolutions."""

    def __init__(self, operation: Callable[[Tensor], Tensor], factor: int = 1) -> None:
        super().__init__(6)
        self.inner, self.conv = tiny.conv(8, 8), tiny.conv(8 * factor, 6)
        self.operation = operation

    def body(self, x: Tensor) -> Tensor:
        return self.conv(self.operation(self.inner(x)))


@pytest.mark.parametrize(
    "operation, factor",
    [
        (lambda x: torch.celu_(x), 1),
        (lambda x: torch.selu_(x), 1),
        (lambda x: x.exp_(), 1),
        (lambda x: x.square_(), 1),
        (lambda x: F.hardshrink(x), 1),
        (lambda x: F.threshold(x, 0.1, 0.0), 1),
        (lambda x: x.to(x.sigmoid()), 1),
        (lambda x: torch.subtract(x, x.sigmoid()), 1),
        (lambda x: torch.divide(x, 2), 1),
        (lambda x: x.multiply_(2.0), 1),
        (lambda x: torch.broadcast_to(x, x.shape), 1),
        (lambda x: torch.tile(x, (1, 2, 1, 1)), 2),
        (lambda x: x.repeat_interleave(2, 1), 2),
        (lambda x: F.pixel_unshuffle(x, 2), 4),
        (lambda x: torch.moveaxis(x, 1, 2).swapdims(1, 2), 1),
        (lambda x: torch.group_norm(input=x, num_groups=1) * 0 + x, 1),
        (lambda x: torch.softmax(input=x, dim=2), 1),
        (lambda x: torch.where(x > 0, x, 0.1 * x.square()), 1),
        (lambda x: F.pad(x, (1, 1, 0, 0, 0, 0)), 1),
        (lambda x: torch.min(x, torch.tensor(0.2)), 1),
        (lambda x: x.mean((2, 3), keepdim=True).expand_as(torch.zeros_like(x)), 1),
        (lambda x: torch.cat([torch.zeros_like(x[:, :, :1]), x], 2), 1),
    ],
)
def test_operations_that_are_followed(operation: Callable[[Tensor], Tensor], factor: int):
    torch.manual_seed(0)
    model, x = tiny.randomise(Through(operation, factor)), torch.randn(2, 3, 12, 12)
    structure = trace(model, lambda model: model(x))
    inner = group(structure, "inner")
    confirmed = group(confirm(model, structure, lambda model: model(x)), "inner")
    if "group_norm" in operation.__code__.co_names:
        assert "a GroupNorm normalises across these channels" in str(inner.refused)
    else:
        assert inner.refused is None and confirmed.refused is None
        assert inner.readers[0].index.shape == (8, factor)


@pytest.mark.parametrize(
    "operation, reason",
    [
        (lambda x: x.unsqueeze_(0).squeeze(0), "the operation 'unsqueeze_' is not understood"),
        (lambda x: x.cumsum_(1), "the operation 'cumsum_' is not understood"),
        (lambda x: F.pixel_shuffle(x.movedim(1, 2), 2)[:, :1].repeat(1, 8, 1, 1), "'pixel_shuffle' is not"),
        (lambda x: torch.index_select(x, 1, torch.arange(8).flip(0)), "'index_select' takes these channels from fixed"),
        (lambda x: x.unfold(1, 8, 1)[..., 0].repeat(1, 8, 1, 1), "'__getitem__' folds these channels"),
        (lambda x: F.unfold(x, 1).view(x.shape), "the operation 'unfold' is not understood"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, 1:], "these channels are padded with others"),
    ],
)
def test_operations_that_are_refused(operation: Callable[[Tensor], Tensor], reason: str):
    torch.manual_seed(0)
    model, x = tiny.randomise(Through(operation)), torch.randn(2, 3, 12, 12)
    assert reason in str(group(trace(model, lambda model: model(x)), "inner").refused)


class Mean(nn.Module):
    """Divides by a mean over the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("OwnRMSNorm", "an RMSNorm normalises across these channels"),
        ("OwnLayerNorm", "a LayerNorm normalises across these channels"),
        ("OwnGRN", "a global response norm normalises across these channels"),
        ("OwnNorm", "a norm normalises across these channels"),
        ("Mean", "a mean, sum or norm runs across these channels"),
    ],
)
def test_a_norm_whose_code_computes_its_means_is_called_a_norm(name: str, reason: str):
    norm = type(name, (Mean,), {})()
    model, x = tiny.randomise(Through(norm)), torch.randn(2, 3, 12, 12)
    assert reason in str(group(trace(model, lambda model: model(x)), "inner").refused)


class Sinks(nn.Module):
    """Scores of heads, joined along the keys with a sink for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 12), nn.Linear(12, 3)
        self.sinks, self.heads = nn.Parameter(torch.randn(3)), 3

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.cat([q @ k.mT, self.sinks.view(1, -1, 1, 1).expand(len(x), -1, x.shape[1], 1)], -1)
        scores = scores - scores.max(-1, keepdim=True).values
        weights = scores.softmax(-1)[..., :-1]
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Rotated(nn.Module):
    """Queries and keys turned as complex numbers, and keys written into a new tensor in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.shared, self.v = (nn.Linear(6, n) for n in (12, 6, 2, 12))
        self.out, self.heads = nn.Linear(12, 3), 3

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        q, v = (layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.q, self.v))
        pairs = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2).contiguous())
        q = torch.view_as_real(pairs * torch.tensor(1j)).flatten(3)
        own = self.k(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k = own.new_empty(*own.shape[:-1], 4)
        k[..., :2].copy_(own)
        k[..., 2:].copy_(self.shared(x)[:, None].expand(-1, own.shape[1], -1, -1))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class ByHand(nn.Linear):
    """A linear layer that multiplies with its transposed weight, as Falcon's does."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Positions(nn.Module):
    """Two layers of attention that share a table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 3)
        self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(6, 36), "out": nn.Linear(12, 6)}) for _ in range(2))
        self.last, self.heads = nn.Linear(6, 2), 3

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        bias = self.table((at[:, None] - at).clamp(0, 7)).permute(2, 0, 1)[None]
        for layer in self.layers:
            q, k, v = layer["qkv"](x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            x = x + layer["out"](((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.last(x)


class Biased(nn.Module):
    """Queries to which a row for each head is added, and scores that are added to those of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.far, self.out = nn.Linear(6, 36), nn.Linear(6, 12, bias=False), nn.Linear(12, 3)
        self.content, self.place, self.heads = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4)), 3

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, 4).unbind(2)
        far = self.far(x.flip(1)).view(batch, length, self.heads, 4).permute(0, 2, 3, 1)
        scores = F.pad((q + self.place).transpose(1, 2) @ far, (1, 0))[..., 1:].reshape(-1, length, length)
        q = (q.transpose(1, 2) + self.content.view(1, self.heads, 1, 4)).reshape(-1, length, 4)
        k, v = (t.transpose(1, 2).reshape(-1, length, 4) for t in (k, v))
        mixed = scores.baddbmm(q, k.mT).softmax(-1).bmm(v).view(batch, self.heads, length, 4)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("model", "groups"),
    [
        (Biased(), ["qkv"]),
        (Sinks(), ["qkv"]),
        (Rotated(), ["q"]),
        (nn.Sequential(ByHand(6, 16), nn.ReLU(), ByHand(16, 3)), ["0"]),
        (Positions(), ["layers.0.qkv"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_heads_of_other_forms_pass_the_mask_oracle(model: nn.Module, groups: list[str]) -> None:
    torch.manual_seed(1)
    model, x = model.eval().requires_grad_(False), torch.randn(2, 5, 6)
    structure = confirm(model, trace(model, lambda m: m(x)), lambda m: m(x))
    assert [g.name for g in structure.prunable] == groups
    plan = Plan({name: (0, 2) for name in groups})
    small = shrink(copy.deepcopy(model), structure, plan)
    torch.testing.assert_close(small(x), mask_readers(model, structure, plan)(x), rtol=1e-5, atol=1e-6)
    assert float((small(x) - model(x)).abs().max()) > 1e-4
    assert sizes_of(model, structure).parameters({name: 2 for name in groups}) == sum(
        p.numel() for p in small.parameters()
    )
    torch.testing.assert_close(expand(small, model, structure, plan)(x), small(x), rtol=1e-5, atol=1e-6)
