"""Every tensor that a forward pass returns, by its place in the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested lists, tuples, mappings and dataclasses, in order, named ``boxes.0``; "" alone.

    An object of another class is looked into where it is the whole output. A cache of keys and values is state, not
    output.
    """
    if isinstance(output, Tensor):
        yield name, output
        return
    if isinstance(output, Mapping):
        entries = list(output.items())
    elif isinstance(output, (list, tuple)):
        entries = list(zip(getattr(output, "_fields", range(len(output))), output, strict=True))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        entries = [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    elif not name and hasattr(output, "__dict__"):
        entries = list(vars(output).items())
    else:
        return
    for key, value in entries:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def difference(output: Tensor, expected: Tensor) -> float:
    """The Euclidean distance of two tensors of one shape over the norm of ``expected``, where that is finite.

    0 where both are zero, NaN where ``output`` is not finite and ``expected`` is.
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    finite = expected.isfinite()
    ours, theirs = output[finite].to(wide), expected[finite].to(wide)
    distance, norm = float((ours - theirs).norm()), float(theirs.norm())
    return distance / norm if norm else distance
