"""Whether two copies of a model compute the same but for what their state dicts hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Where a model came from: attributes that no forward pass reads.
ORIGINS = {"pretrained_cfg", "default_cfg", "name_or_path", "_name_or_path", "_commit_hash"}
# What a state dict holds or what stands as a module of its own.
HELD = {"_parameters", "_modules", "_buffers"}


def same_but_for_values(first: nn.Module, second: nn.Module) -> bool:
    """Whether only parameters and statistics of a state dict may tell two models apart.

    Modules have the same classes, attributes, hooks and buffers outside the state dict, and tensors the same types.
    What cannot be compared counts as different: only models that are sure to be alike are taken for it.
    """
    ours, theirs = dict(first.named_modules()), dict(second.named_modules())
    if ours.keys() != theirs.keys():
        return False
    known = {id(module) for module in (*ours.values(), *theirs.values())}
    return all(_same_module(module, theirs[name], known) for name, module in ours.items())


def _same_module(first: nn.Module, second: nn.Module, known: Collection[int]) -> bool:
    if type(first) is not type(second):
        return False
    if not (_same_kinds(first._parameters, second._parameters) and _same_kinds(first._buffers, second._buffers)):
        return False
    outside = first._non_persistent_buffers_set
    if outside != second._non_persistent_buffers_set:
        return False
    if not all(_same(first._buffers[name], second._buffers[name], known, ()) for name in outside):
        return False
    return _same(_attributes(first), _attributes(second), known, ())


def _same_kinds(first: Mapping[str, Tensor | None], second: Mapping[str, Tensor | None]) -> bool:
    """Whether tensors of the same names have the same shapes and types."""
    kinds = [
        {n: None if t is None else (t.shape, t.dtype, t.device) for n, t in held.items()} for held in (first, second)
    ]
    return kinds[0] == kinds[1]


def _attributes(thing: object) -> dict[str, Any]:
    left_out = ORIGINS | HELD if isinstance(thing, nn.Module) else ORIGINS
    return {name: value for name, value in vars(thing).items() if name not in left_out}


def _same(first: Any, second: Any, known: Collection[int], inside: tuple[int, ...]) -> bool:
    """Whether two values are equal; modules among the ``known`` ones, which are compared on their own, are.

    ``inside`` are the values that the first is part of.
    """
    if first is second:
        return True
    if isinstance(first, nn.Module):
        return id(first) in known and id(second) in known
    if type(first) is not type(second) or id(first) in inside:
        return False
    inside = (*inside, id(first))
    if isinstance(first, Tensor):
        return _same_kinds({"": first}, {"": second}) and torch.equal(first, second)
    if isinstance(first, MethodType):
        return first.__func__ is second.__func__ and _same(first.__self__, second.__self__, known, inside)
    if isinstance(first, partial):
        one, other = ((function.func, function.args, function.keywords) for function in (first, second))
        return _same(one, other, known, inside)
    if isinstance(first, Mapping):
        return list(first) == list(second) and all(_same(first[key], second[key], known, inside) for key in first)
    if isinstance(first, list | tuple):
        pairs = zip(first, second, strict=False)
        return len(first) == len(second) and all(_same(one, other, known, inside) for one, other in pairs)
    if isinstance(first, int | float | complex | str | bytes | set | frozenset):
        return bool(first == second)
    if hasattr(first, "__dict__") and not isinstance(first, FunctionType | type):
        return _same(_attributes(first), _attributes(second), known, inside)
    return _equal(first, second)


def _equal(first: object, second: object) -> bool:
    try:
        return bool(first == second)
    except Exception:  # an object may define equality as it likes
        return False
