"""Where a traced tensor carries which components, and operations run on component numbers in place of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.structure.torch_ops import OPERATIONS, Call, Kind, swap, tensors_in


@dataclass(frozen=True)
class Axis:
    """Components along one axis of a tensor: ``ids`` int64 ``(size of that axis,)``, -1 where none are known."""

    dim: int
    ids: Tensor


@dataclass(frozen=True)
class Grid:
    """Components along several axes of a tensor: ``ids`` int64, of size 1 along the axes where they do not vary."""

    ids: Tensor


Placement = Axis | Grid


@dataclass(frozen=True)
class TracedCall(Call):
    """A call as its tracing rule sees it.

    ``key`` is its entry in `OPERATIONS`: the name, or the class of a module that is registered as one operation.
    ``placements`` is what each input carried, by ``id``, before it ran; ``macs`` the multiply-adds that it took.
    """

    key: str | type[nn.Module]
    outputs: list[Tensor]
    placements: dict[int, Placement | None]
    macs: int

    @property
    def kind(self) -> Kind | None:
        """What the table says of the operation, None for nothing."""
        return OPERATIONS.get(self.key)

    def axis(self, value: Any) -> Axis | None:
        """The components of an input that carries them along one axis, else None."""
        placement = self.placements.get(id(value)) if isinstance(value, Tensor) else None
        return placement if isinstance(placement, Axis) else None

    @property
    def carriers(self) -> list[tuple[Tensor, Placement]]:
        """The inputs that carry components, those along one axis first."""
        placed = [(t, p) for t in self.inputs if (p := self.placements.get(id(t))) is not None]
        return sorted(placed, key=lambda pair: isinstance(pair[1], Grid))

    @property
    def grids(self) -> list[Grid]:
        """What the inputs carry along several axes."""
        return [p for _, p in self.carriers if isinstance(p, Grid)]

    def moved(self) -> list[Placement | None]:
        """What each output carries, by running the operation on component numbers; -1 stands for no component."""
        carried = {id(t): placement for t, placement in self.carriers}
        table = {
            id(t): torch.full_like(t, -1, dtype=torch.int64, device="cpu")
            for t in self.inputs
            if t.is_floating_point() or self.kind == "join"
        }
        table |= {id(t): numbered(carried[id(t)], t) for t in self.inputs if id(t) in carried}
        outputs = self.func(*swap(self.args, table), **swap(self.kwargs, table))
        return [placement_of(ids) for ids in tensors_in(outputs)]


def numbered(placement: Placement, like: Tensor) -> Tensor:
    """Component numbers at every element of a tensor, int64 of its shape and memory layout (``view`` asks for it)."""
    ids = placement.ids
    if isinstance(placement, Axis):
        shape = [1] * like.ndim
        shape[placement.dim] = len(ids)
        ids = ids.view(shape)
    return torch.empty_like(like, dtype=torch.int64, device="cpu").copy_(ids)


def of_one_item(ids: Tensor) -> Tensor:
    """Of components that stand on one axis once for every item, as heads folded into a batch do, those of one item."""
    if len(ids) == 0 or bool((ids == ids[0]).all()):
        return ids
    periods = (size for size in range(2, len(ids) + 1) if len(ids) % size == 0)
    return next(ids[:size] for size in periods if torch.equal(ids, ids[:size].repeat(len(ids) // size)))


def is_constant(tensor: Tensor, dim: int) -> bool:
    """Whether a tensor's values do not vary along one axis."""
    return bool((tensor == tensor.narrow(dim, 0, 1)).all())


def placement_of(ids: Tensor) -> Placement | None:
    """The axes along which component numbers vary; None for no axis, or for several with unknown numbers among them."""
    if not ids.numel():
        return None
    for dim in range(ids.ndim):
        if is_constant(ids, dim):
            ids = ids.narrow(dim, 0, 1)
    wide = [dim for dim, size in enumerate(ids.shape) if size > 1]
    if len(wide) == 1:
        return Axis(wide[0], ids.flatten().clone())
    return Grid(ids.clone()) if wide and bool((ids >= 0).all()) else None
