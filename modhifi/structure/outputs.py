"""The tensors that a forward pass returns, by their place in the output, and how far two of them are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Rows hardly differ where their spread is no larger a share of their squared norm: float32 rounds off as much.
HARDLY = 1e-13


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


def classes_last(outputs: Tensor) -> Tensor:
    """Maps ``(b, classes, height, width)``, as losses of torch read them, with their classes behind."""
    return outputs.movedim(1, -1) if outputs.ndim > 3 else outputs


def spread_of(batches: Iterable[tuple[Tensor, Tensor | None]]) -> float:
    """The mean squared distance of the rows of values, over all batches, from their mean.

    A batch is ``(batch, ..., width)`` behind which a bool mask of its rows stands, None for all. Where the rows hardly
    differ it is their mean squared norm.
    """
    count, squares, total = 0, 0.0, torch.zeros(())
    for outputs, real in batches:
        rows = _rows(outputs, real).double()
        count, squares, total = count + len(rows), squares + float(rows.square().sum()), total + rows.sum(0).cpu()
    return (around_mean(squares, total, count) or squares) / count or 1.0


def around_mean(squares: float, total: Tensor, count: int) -> float:
    """The squared distances of ``count`` rows from their mean, of their squared norms and their sum; 0 for rounding."""
    around = squares - float(total.square().sum()) / count
    return around if around > HARDLY * squares else 0.0


def _rows(outputs: Tensor, real: Tensor | None) -> Tensor:
    values = classes_last(outputs)
    values = values.cpu() if values.device.type == "mps" else values  # it has no float64
    masked = real is not None and real.shape == values.shape[:-1]
    return values[real.to(values.device)] if masked and real is not None else values.flatten(0, -2)


def difference(output: Tensor, expected: Tensor) -> float:
    """The Euclidean distance of two tensors of one shape over the norm of ``expected``, where that is finite.

    0 where both are zero, NaN where ``output`` is not finite and ``expected`` is.
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    finite = expected.isfinite()
    ours, theirs = output[finite].to(wide), expected[finite].to(wide)
    distance, norm = float((ours - theirs).norm()), float(theirs.norm())
    return distance / norm if norm else distance
