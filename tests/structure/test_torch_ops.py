"""The table of operations: names that torch knows, of the kind that they are said to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modhifi.structure.torch_ops import KINDS, OPERATIONS, names_of, operation_name, spellings, writes_in_place
from modhifi.structure.tracing import tracer  # noqa: F401  # registers the rules
from modhifi.structure.tracing.operations import RULES

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "threshold": (0.5, 0.0),
    "_threshold": (0.5, 0.0),
    "clamp": (0.3, 0.6),
    "clip": (0.3, 0.6),
    "pow": (2,),
    "__pow__": (2,),
    "__ipow__": (2,),
    "prelu": (torch.tensor([0.3]),),
}
# What torch calls its pooling functions inside scripts, and older names of a division.
UNNAMED = {"boolean_dispatch", "__div__", "__idiv__", "__rdiv__"}


PLACES = (F, torch, Tensor, torch._C._nn, torch._C._linalg)


def functions(name: str) -> list[Any]:
    return [getattr(place, name) for place in PLACES if hasattr(place, name)]


def test_every_name_is_one_of_torch() -> None:
    """And the one that a function is seen under: ``torch.nn.functional.logsigmoid`` is seen as ``log_sigmoid``."""
    names = {name for name in names_of(*KINDS) if "::" not in name}
    assert {name for name in names if not functions(name)} <= UNNAMED
    plain = {name for name in names - UNNAMED if not name.startswith("__") and all(map(callable, functions(name)))}
    assert all(name in map(operation_name, functions(name)) for name in plain)


@pytest.mark.parametrize("name", sorted(names_of("activation", "elementwise")))
def test_an_elementwise_operation_looks_at_one_element(name: str) -> None:
    run = functions(name)[0]
    arguments = ARGUMENTS.get(name, ARGUMENTS.get(name.rstrip("_"), ()))
    x = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    out = run(x.clone(), *arguments)
    assert out.shape == x.shape
    for sample, channel, place in ((0, 0, 0), (1, 3, 2), (2, 4, 3)):
        alone = run(x[sample, channel, place].view(1), *arguments)[0]
        assert alone.item() == pytest.approx(out[sample, channel, place].item(), rel=1e-5)


def test_every_kind_has_a_rule_of_the_tracer() -> None:
    assert set(RULES) == set(KINDS) - {"metadata", "own"}


def test_variants_are_derived() -> None:
    assert spellings("relu") == ("relu", "relu_")
    assert set(spellings("add")) == {"add", "add_", "__add__", "__radd__", "__iadd__"}
    # An in-place movement has changed its input's shape before a rule could look at it.
    assert not {"squeeze_", "unsqueeze_", "transpose_", "t_"} & OPERATIONS.keys()
    # The operands change places, and with them what a rule may say.
    assert OPERATIONS["__rtruediv__"] == OPERATIONS["__rdiv__"] == "binary"


@torch.library.custom_op("modhifi_tests::relu", mutates_args=())
def relu_of_ours(x: Tensor) -> Tensor:
    return x.cumsum(1)


def test_custom_operators_are_told_from_operations_of_the_same_name() -> None:
    ours = torch.ops.modhifi_tests.relu
    assert operation_name(ours) == operation_name(ours.default) == "modhifi_tests::relu"
    assert operation_name(torch.ops.aten.relu) == operation_name(torch.relu) == "relu"
    assert operation_name(Tensor.T.__get__) == "T"


@pytest.mark.parametrize(
    ("func", "kwargs", "expected"),
    [
        (torch.relu, {}, False),
        (torch.relu_, {}, True),
        (F.relu, {"inplace": True}, True),
        (F.relu, {"inplace": False}, False),
        (Tensor.__iadd__, {}, True),
        (Tensor.__add__, {}, False),
        (Tensor.__setitem__, {}, True),
        (Tensor.__invert__, {}, False),
        (torch.ops.aten.relu_.default, {}, True),
        (torch.ops.aten.relu.default, {}, False),
    ],
)
def test_what_overwrites_its_input(func: Callable[..., Any], kwargs: dict[str, Any], expected: bool) -> None:
    assert writes_in_place(func, kwargs) is expected
