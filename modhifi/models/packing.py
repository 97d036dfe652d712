"""Several inputs of a forward pass as one tensor: an item is a row of bytes, and a batch a matrix of them.

So everything that batches, hashes, stores or moves samples treats them as it treats an image.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError

# A nest deeper than this is no set of inputs.
DEPTH = 8


@dataclass(frozen=True)
class Packing:
    """The form of an item: nested tuples and mappings whose leaves are tensors, each of one shape and dtype.

    ``form`` has None in the place of each tensor; ``names`` are the tensors' places (``mask``, ``1.ids``). Those in
    ``flat`` hold rows, which a model reads without an axis of items: the rows of one item behind those of another.
    """

    form: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    flat: tuple[str, ...] = ()

    @classmethod
    def of(cls, item: Any) -> Packing:
        """The form of one item; raises ModhifiError where a leaf is no tensor."""
        leaves = dict(_leaves(item))
        if not leaves:
            raise ModhifiError("an item of the data holds no tensor; give every input as one")
        shapes = tuple(tuple(tensor.shape) for tensor in leaves.values())
        return cls(
            _filled(item, iter([None] * len(leaves))), tuple(leaves), shapes, tuple(t.dtype for t in leaves.values())
        )

    def fits(self, item: Any) -> bool:
        """Whether an item has the same inputs, whatever their shapes."""
        return _names(item) == self.names

    def pack(self, item: Any) -> Tensor:
        """The bytes of one item, uint8 ``(size,)``; raises ModhifiError where an input has another shape or dtype."""
        leaves = dict(_leaves(item))
        if tuple(leaves) != self.names:
            raise ModhifiError(f"an item has the inputs {', '.join(leaves)}, another {', '.join(self.names)}")
        for (name, tensor), shape, dtype in zip(leaves.items(), self.shapes, self.dtypes, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ModhifiError(
                    f"the input '{name}' is {tensor.dtype} {tuple(tensor.shape)} in one item and {dtype} {shape} in "
                    "another; give items of one shape and dtype"
                )
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ModhifiError(f"the input '{name}' holds NaN or infinite values; repair it or leave it out")
        return torch.cat([t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in leaves.values()])

    def nest(self, batch: Tensor, dtype: torch.dtype | None = None) -> Any:
        """The inputs ``(n, ...)`` in the item's form, of packed items ``(n, size)``; floats become ``dtype``."""
        sizes = [math.prod(s) * t.itemsize for s, t in zip(self.shapes, self.dtypes, strict=True)]
        tensors = []
        for piece, name, shape, kind in zip(batch.split(sizes, 1), self.names, self.shapes, self.dtypes, strict=True):
            # A copy: a row of the matrix is contiguous, and may begin where numbers of this kind do not.
            tensor = piece.clone(memory_format=torch.contiguous_format).view(kind).reshape(len(batch), *shape)
            tensor = tensor.flatten(0, 1) if name in self.flat else tensor
            tensors.append(tensor.to(dtype) if kind.is_floating_point else tensor)
        return _filled(self.form, iter(tensors))

    def call(self, model: nn.Module, inputs: Any) -> Any:
        """One forward pass: a mapping gives arguments by name and a tuple by position, if ``forward`` takes them so."""
        signature = inspect.signature(model.forward)
        try:
            if isinstance(inputs, Mapping):
                signature.bind(**inputs)
            else:
                signature.bind(*inputs)
        except TypeError:
            return model(inputs)
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)

    def example(self) -> Tensor:
        """Two packed items, uint8 ``(2, size)``: seeded normal noise, and zeros for integers."""
        generator, items = torch.Generator().manual_seed(0), []
        for _ in range(2):
            tensors = [
                torch.randn(s, generator=generator).to(t) if t.is_floating_point else torch.zeros(s, dtype=t)
                for s, t in zip(self.shapes, self.dtypes, strict=True)
            ]
            items.append(self.pack(_filled(self.form, iter(tensors))))
        return torch.stack(items)

    def to_json(self) -> dict[str, Any]:
        """The form as JSON-able data; tuples become lists."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        flat = {"flat": list(self.flat)} if self.flat else {}
        return {"form": self.form, "shapes": [list(shape) for shape in self.shapes], "dtypes": dtypes, **flat}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Packing:
        """The form that :meth:`to_json` wrote; raises ModhifiError for anything else."""
        try:
            dtypes = tuple(getattr(torch, str(name)) for name in content["dtypes"])
            empty = [torch.empty(shape, dtype=t) for shape, t in zip(content["shapes"], dtypes, strict=True)]
            return replace(cls.of(_filled(content["form"], iter(empty))), flat=tuple(content.get("flat", ())))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration):
            raise ModhifiError("the manifest's form of the model's inputs is broken; restore the file") from None


class Unpacked(nn.Module):
    """A model of several inputs as one of a packed batch."""

    def __init__(self, model: nn.Module, packing: Packing) -> None:
        super().__init__()
        self.model, self.packing = model, packing

    def forward(self, batch: Tensor) -> Any:
        parameter = next(self.model.parameters(), torch.empty(0))
        return self.packing.call(self.model, self.packing.nest(batch.to(parameter.device), parameter.dtype))


def pack_batch(batch: Any) -> tuple[Packing, Tensor]:
    """The form of the items of a batch whose tensors have the items on axis 0, and the packed items, at most two.

    Raises ModhifiError where a leaf is no tensor or the tensors hold different numbers of items.
    """
    lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in _leaves(batch)}
    count = min(lengths.values(), default=0)
    if not count or len(set(lengths.values())) > 1:
        raise ModhifiError(
            f"the inputs of an example batch hold {', '.join(f'{n} ({name})' for name, n in lengths.items())} items; "
            "give every input with the batch on axis 0"
        )
    items = [_filled(batch, iter([t[i] for _, t in _leaves(batch)])) for i in (0, min(1, count - 1))]
    packing = Packing.of(items[0])
    return packing, torch.stack([packing.pack(item) for item in items])


def is_several(value: Any) -> bool:
    """Whether a value is a nest of inputs rather than one."""
    return isinstance(value, Mapping | tuple | list)


def _leaves(item: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(item, Tensor):
        yield name, item
    elif is_several(item) and depth < DEPTH:
        for key, value in item.items() if isinstance(item, Mapping) else enumerate(item):
            yield from _leaves(value, f"{name}.{key}" if name else str(key), depth + 1)
    else:
        raise ModhifiError(f"the input '{name}' of an item is {type(item).__name__}; give every input as a tensor")


def _names(item: Any) -> tuple[str, ...]:
    try:
        return tuple(name for name, _ in _leaves(item))
    except ModhifiError:
        return ()


def _filled(form: Any, leaves: Iterator[Any]) -> Any:
    """The nest of ``form`` with other leaves, lists as tuples."""
    if isinstance(form, Mapping):
        return {str(key): _filled(value, leaves) for key, value in form.items()}
    if isinstance(form, tuple | list):
        return tuple(_filled(value, leaves) for value in form)
    return next(leaves)
