"""A module of a program's own comes in many wrappings: the copy has plain layers, and computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import Forgetful, Plain, Residual
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.plain_copy import in_order, plain_copy
from modhifi.structure.clone import clone

BATCH = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def around(change: Callable[[nn.Conv2d], nn.Module]) -> Callable[[], nn.Module]:
    """A small network with its second convolution changed, after a pass with gradients."""

    def make() -> nn.Module:
        net = Plain()
        net.conv[0] = change(net.conv[0])
        net(BATCH)
        return net.eval()

    return make


def masked(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.3)
    return prune.random_unstructured(layer, "weight", 0.3)


FOLDED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight_norm": (weight_norm, "WeightNorm of 1 weight folded in"),
    "spectral_norm": (spectral_norm, "SpectralNorm of 1 weight folded in"),
    "parametrised weight_norm": (parametrizations.weight_norm, "WeightNorm of 1 weight folded in"),
    "parametrised spectral_norm": (parametrizations.spectral_norm, "SpectralNorm of 1 weight folded in"),
    "orthogonal": (parametrizations.orthogonal, "Orthogonal of 1 weight folded in"),
    "two": (lambda m: parametrizations.spectral_norm(parametrizations.weight_norm(m)), "WeightNorm and SpectralNorm"),
    "masks": (masked, "Mask of 1 weight folded in"),
}
WRAPPED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "compiled": (lambda m: torch.compile(m, backend="eager"), "OptimizedModule"),
    "data-parallel": (nn.DataParallel, "DataParallel"),
    "both": (lambda m: torch.compile(nn.DataParallel(m), backend="eager"), "DataParallel"),
}


@pytest.mark.parametrize("case", FOLDED)
def test_weights_that_are_computed_become_plain(case: str) -> None:
    change, said = FOLDED[case]
    net = around(change)()
    before, names = copy.deepcopy(net.state_dict()), set(net.state_dict())
    with torch.no_grad():
        expected = net(BATCH)
    loaded = load_model(net, example=BATCH)
    assert torch.equal(loaded.model(BATCH), expected)
    assert set(loaded.model.state_dict()) == set(Plain().state_dict())
    assert type(loaded.model.conv[0]) is nn.Conv2d
    assert any(said in note for note in loaded.info["notes"])
    # the caller's own stays as it was, and can be loaded again
    assert set(net.state_dict()) == names and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        assert torch.equal(net(BATCH), expected)
    assert torch.equal(load_model(net, example=BATCH).model(BATCH), expected)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_are_taken_off(case: str, inside: bool) -> None:
    wrap, said = WRAPPED[case]
    net = Plain().eval()
    expected = net(BATCH).detach()
    names = set(net.state_dict())
    if inside:
        net.conv = wrap(net.conv)
    loaded = load_model(net if inside else wrap(net), example=BATCH)
    assert type(loaded.model) is Plain and set(loaded.model.state_dict()) == names
    assert torch.equal(loaded.model(BATCH), expected)
    assert any(said in note for note in loaded.info["notes"])
    assert loaded.source == "module:Plain"


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_distributed_module_is_taken_out(one_process: None) -> None:
    loaded = load_model(DistributedDataParallel(Plain()), example=BATCH)
    assert type(loaded.model) is Plain and "DistributedDataParallel" in loaded.info["notes"][0]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(2, 8, 16, 16))])
def test_scripted_modules_are_refused(make: Callable[[nn.Module], nn.Module], inside: bool) -> None:
    net: nn.Module = Plain().eval()
    net.conv = make(net.conv)
    with pytest.raises(ModhifiError, match="scripted"):
        load_model(net if inside else net.conv, example=BATCH)


class LowRank(nn.Module):
    """A layer with an adapter beside it, as peft puts it there."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, layer.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_an_adapter_is_refused() -> None:
    net = Plain()
    net.head = LowRank(net.head)
    with pytest.raises(ModhifiError, match=r"carries an adapter \(head\); merge the adapter first"):
        load_model(net, example=BATCH)


def test_an_adapter_of_peft_is_refused_until_it_is_merged() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    adapted = peft.get_peft_model(Plain(), peft.LoraConfig(target_modules=["head"], r=2))
    with pytest.raises(ModhifiError, match="merge"):
        load_model(adapted, example=x)
    merged = adapted.merge_and_unload().eval()
    with torch.no_grad():
        assert torch.equal(load_model(merged, example=x).logits(x), merged(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(Plain(), Forgetful()), lambda: torch.fx.symbolic_trace(Residual()), Plain]
)
def test_copies_are_in_the_mode_of_the_original(make: Callable[[], nn.Module], training: bool) -> None:
    net = make().train(training)
    next(net.children()).train(not training)  # as parts may be
    copied = clone(net)
    assert [m.training for m in copied.modules()] == [m.training for m in net.modules()]
    assert not any(m.training for m in plain_copy(net, "a net")[0].modules())


@pytest.mark.parametrize("size", [1, 3])
def test_weights_are_in_the_order_of_their_axes(size: int) -> None:
    """A kernel of one pixel is contiguous in both orders, and torch chooses by its strides."""
    module = nn.Sequential(nn.Conv2d(4, 8, size), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    strides = module[0].weight.stride()
    assert strides[1] == 1
    copied, _ = plain_copy(module, "it")
    for model in (copied, in_order(module)):
        assert model[0].weight.stride() == (4 * size**2, size**2, size, 1)
        assert torch.equal(model[0].weight, module[0].weight)
    assert module[0].weight.stride() == strides and in_order(copied) is copied
