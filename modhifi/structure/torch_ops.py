"""What the tracer knows of torch's operations: which are elementwise, which only move elements, which mix channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ELEMENTWISE = frozenset(
    """relu relu_ relu6 silu silu_ gelu sigmoid sigmoid_ tanh tanh_ hardswish hardswish_ hardsigmoid hardsigmoid_
    hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu celu mish mish_ softplus softsign logsigmoid clamp clamp_
    clip exp sqrt rsqrt abs neg square pow __pow__ __neg__ erf dropout dropout_ feature_dropout dropout1d dropout2d
    dropout3d alpha_dropout contiguous clone detach to float half bfloat16 double type type_as requires_grad_
    quick_gelu cpu cuda""".split()
)
MOVEMENT = frozenset(
    """view reshape flatten unflatten permute transpose swapaxes movedim unsqueeze squeeze expand expand_as repeat
    chunk split tensor_split split_with_sizes __getitem__ narrow select unbind roll flip t T mT H mH view_as reshape_as
    cat concat concatenate stack""".split()
)
RESHAPES = frozenset("view reshape unflatten view_as reshape_as".split())
# movements that name fixed places on the axis: after a cut they would take other channels
PLACED = frozenset("chunk split tensor_split split_with_sizes __getitem__ narrow select unbind roll".split())
JOINS = frozenset("cat concat concatenate".split())
BINARY = frozenset(
    """add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__ rsub mul mul_ __mul__ __rmul__ __imul__ div
    div_ __truediv__ __rtruediv__ __div__ true_divide maximum minimum multiply addcmul where masked_fill
    masked_fill_""".split()
)
SUMS = frozenset("add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__ rsub".split())
PRODUCTS = frozenset("matmul __matmul__ __rmatmul__ bmm".split())
# new tensors that take nothing but a shape from their input
CREATION = frozenset(
    "zeros_like ones_like empty_like full_like new_zeros new_ones new_full new_empty new_tensor".split()
)
POOLING = frozenset(
    """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d interpolate upsample
    boolean_dispatch _max_pool2d max_pool2d_with_indices""".split()
)
REDUCTION = frozenset("mean sum amax amin norm linalg_vector_norm".split())
NORMS = frozenset("norm linalg_vector_norm".split())  # which take their order before their axes
CONVS = frozenset("conv1d conv2d conv3d".split())
# what tells of a tensor without handing out its values
METADATA = frozenset(
    """size dim ndimension numel nelement __len__ stride storage_offset element_size get_device data_ptr is_contiguous
    is_floating_point is_complex __hash__ __repr__""".split()
)
# operations that read the channel axis as a whole: named so that the refusal says what it is
MIXING = {
    "layer_norm": "a LayerNorm normalises across these channels",
    "rms_norm": "an RMSNorm normalises across these channels",
    "group_norm": "a GroupNorm normalises across these channels",
    "softmax": "a softmax runs across these channels",
    "normalize": "a normalisation runs across these channels",
}


@dataclass(frozen=True)
class Axis:
    """Components along one axis of a tensor: ``ids`` int64 ``(size of that axis,)``, -1 where none are known."""

    dim: int
    ids: Tensor


@dataclass(frozen=True)
class Grid:
    """Components along several axes of a tensor: ``ids`` int64, of size 1 along the axes where they do not vary."""

    ids: Tensor


@dataclass(frozen=True)
class Call:
    """One operation as it was run; ``axes`` holds what was known of each input, by ``id``, before it ran."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    axes: dict[int, Axis | Grid | None]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def axis(self, value: Any) -> Axis | None:
        found = self.axes.get(id(value)) if isinstance(value, Tensor) else None
        return found if isinstance(found, Axis) else None

    @property
    def known(self) -> list[tuple[Tensor, Axis]]:
        """The inputs that carry components along one axis."""
        return [(t, axis) for t in self.inputs if isinstance(axis := self.axes.get(id(t)), Axis)]

    @property
    def grids(self) -> list[tuple[Tensor, Grid]]:
        """The inputs that carry components along several axes."""
        return [(t, grid) for t in self.inputs if isinstance(grid := self.axes.get(id(t)), Grid)]

    @property
    def records(self) -> list[tuple[Tensor, Axis | Grid]]:
        return [*self.known, *self.grids]

    def moved(self) -> list[Axis | Grid | None]:
        """Run the operation on component numbers in place of values: where does each output carry which?"""
        carried = {id(t): record for t, record in self.records}
        table = {
            id(t): torch.full_like(t, -1, dtype=torch.int64, device="cpu")
            for t in self.inputs
            if t.is_floating_point() or self.name in JOINS
        }
        table |= {id(t): spread(carried[id(t)], t) for t in self.inputs if id(t) in carried}
        return [detect(ids) for ids in tensors_in(self.func(*swap(self.args, table), **swap(self.kwargs, table)))]


def operation_name(func: Callable[..., Any]) -> str:
    """The plain name of a torch function; of a tensor attribute (``x.T``, ``x.data``) the attribute's name."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", "an attribute"))
    return name


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def swap(value: Any, table: dict[int, Tensor]) -> Any:
    """The same nest of lists, tuples and dictionaries with other tensors in it."""
    if isinstance(value, Tensor):
        return table.get(id(value), value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(swap(v, table) for v in value)
    if isinstance(value, dict):
        return {k: swap(v, table) for k, v in value.items()}
    return value


def spread(record: Axis | Grid, like: Tensor) -> Tensor:
    """Component numbers at every element of a tensor, int64 of its shape and memory layout (``view`` asks for it)."""
    ids = record.ids
    if isinstance(record, Axis):
        shape = [1] * like.ndim
        shape[record.dim] = len(ids)
        ids = ids.view(shape)
    return torch.empty_like(like, dtype=torch.int64, device="cpu").copy_(ids)


def constant(tensor: Tensor, dim: int) -> bool:
    """Whether a tensor's values do not vary along one axis."""
    return bool((tensor == tensor.narrow(dim, 0, 1)).all())


def detect(ids: Tensor) -> Axis | Grid | None:
    """Along which axes component numbers vary; None where along none, or several with unknown numbers among them."""
    if not ids.numel():
        return None
    for dim in range(ids.ndim):
        if constant(ids, dim):
            ids = ids.narrow(dim, 0, 1)
    wide = [dim for dim, size in enumerate(ids.shape) if size > 1]
    if len(wide) == 1:
        return Axis(wide[0], ids.flatten().clone())
    return Grid(ids.clone()) if wide and bool((ids >= 0).all()) else None
