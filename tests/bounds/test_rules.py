"""The bound rules and the table of operations: which have a rule, and that it holds under each of their names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.bounds.certified import Certified, certify
from modhifi.bounds.propagation.affine import Norms
from modhifi.bounds.propagation.interval import nothing
from modhifi.bounds.propagation.rules import RULES
from modhifi.bounds.propagation.walked_call import WalkedCall
from modhifi.models.load import load_model
from modhifi.structure.torch_ops import OPERATIONS, names_of

# Whatever goes through one of these has no certified bound: kinds, and single operations of other kinds.
KINDS_WITHOUT_RULE = {"metadata", "creation", "vector norm", "transposed conv", "grouped product", "recurrent", "own"}
WITHOUT_RULE = set(
    """exp exp_ log log_ sin sin_ cos cos_ sqrt sqrt_ rsqrt rsqrt_ reciprocal reciprocal_ square square_ pow pow_
    __pow__ __ipow__ erf erf_ stack __rtruediv__ __rdiv__ maximum minimum addcmul addcmul_ __rmatmul__ instance_norm
    normalize max_pool1d max_pool3d avg_pool1d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d interpolate upsample
    max_pool2d_with_indices amax amin acos acos_ asin asin_ atan atan_ cosh cosh_ sinh sinh_ tan tan_ exp2 exp2_ expm1
    expm1_ log1p log1p_ log2 log2_ log_softmax cumsum cumprod gt gt_ lt lt_ ge ge_ le le_ eq eq_ ne ne_ greater
    greater_ less less_ greater_equal greater_equal_ less_equal less_equal_ not_equal not_equal_ logical_and
    logical_and_ logical_or logical_or_""".split()
)
# Activations whose Lipschitz constant is not in `modhifi.bounds.lipschitz`.
WITHOUT_CONSTANT = {"hardshrink", "softshrink", "tanhshrink", "threshold", "threshold_", "_threshold"}


def test_every_rule_is_in_the_table_and_what_has_none_is_listed() -> None:
    names = {name for name in OPERATIONS if isinstance(name, str) and "::" not in name}
    assert RULES.keys() <= names
    assert {n for n in names - RULES.keys() if OPERATIONS[n] not in KINDS_WITHOUT_RULE} == WITHOUT_RULE


class Between(nn.Module):
    """One operation between two convolutions."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.name = name
        base = name.rstrip("_")
        self.arguments: tuple[Any, ...] = ()
        if base in ("clamp", "clip"):
            self.arguments = (-0.3, 0.4)
        elif "threshold" in base:
            self.arguments = (0.1, 0.0)
        elif "dropout" in base:
            self.arguments = (0.5, False)
        elif base == "prelu":
            self.slope = nn.Parameter(torch.tensor([0.3]))
            self.arguments = (self.slope,)
        elif base in ("add", "sub", "mul", "div"):
            self.arguments = (0.7,)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.name == "dropout1d":
            x = x.flatten(2)
        run = next(getattr(p, self.name) for p in (F, torch, Tensor, torch._C._nn) if hasattr(p, self.name))
        return self.two(run(x, *self.arguments).view(-1, 4, 4, 4)).flatten(1)


def edited(model: nn.Module) -> Certified:
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.add_(1e-3 * torch.randn_like(parameter))
    batch = torch.randn(3, 3, 6, 6)
    loaded = load_model(model, example=batch[:2])
    return certify(loaded, copy.deepcopy(model).double(), twin.double(), batch.double())


NAMES = names_of("activation", "unchanged") - {"requires_grad_", "cpu", "cuda", "data"}


@pytest.mark.parametrize("name", sorted(NAMES | {"add", "add_", "sub_", "mul_", "div_", "abs_", "neg_"}))
def test_a_rule_holds_under_every_name_of_its_operation(name: str) -> None:
    torch.manual_seed(0)
    found = edited(Between(name).eval())
    assert found.violations() == () and bool((found.measured > 0).all())
    has_constant = name not in WITHOUT_CONSTANT
    assert bool(found.local.isfinite().all()) == has_constant
    assert has_constant or name in found.missing["R2"]


@pytest.mark.parametrize(("name", "exact"), [("half", False), ("bfloat16", False), ("double", True), ("float", True)])
def test_a_cast_that_rounds_has_no_bound(name: str, exact: bool) -> None:
    x = torch.randn(4)
    call = WalkedCall(name, getattr(Tensor, name), (x,), {}, lambda t: nothing(1), {}, {}, {}, Norms(), "")
    assert (RULES[name](call, [getattr(x, name)()]) is not None) == exact
