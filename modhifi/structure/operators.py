"""A layer's weights as matrices: conv groups, columns of components, where a mean can be given back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from modhifi.structure.groups import Group
from modhifi.structure.library_layers import is_transposed
from modhifi.structure.places import operator_at
from modhifi.structure.stacked import Stacked


def kernel_size(module: nn.Module) -> int:
    """Number of kernel positions of an operator, 1 for a linear map."""
    size = 1
    for k in getattr(module, "kernel_size", ()):
        size *= int(k)
    return size


def outputs_first(module: nn.Module, weight: Tensor) -> Tensor:
    """A stored weight with its outputs on axis 0, ``(out, in / G, ...)``: a view but for several transposed groups."""
    return _swapped(module, weight, conv_groups(module))


def as_stored(module: nn.Module, weight: Tensor, groups: int | None = None) -> Tensor:
    """Inverse of :func:`outputs_first`; ``groups`` are those of the weight where the module's own are others."""
    return _swapped(module, weight, conv_groups(module) if groups is None else groups)


def _swapped(module: nn.Module, weight: Tensor, groups: int) -> Tensor:
    """The weight of a layer that stores its inputs first with both axes swapped, of any other as it is."""
    if is_transposed(module):
        return weight.T
    if isinstance(module, _ConvTransposeNd):
        return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight


def weight_matrix(module: nn.Module, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """A copy of an operator's weight as ``(G, out / G, d)`` in a dtype (None: its own), columns in im2col order."""
    if isinstance(module, Stacked):
        return module.matrices.detach().to(dtype, copy=True)
    stored: Tensor = module.get_parameter("weight").detach().to(dtype, copy=True)
    weight, groups = outputs_first(module, stored), conv_groups(module)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def columns_of(module: nn.Module) -> tuple[int, int]:
    """The number of conv groups of an operator and of columns in each: the shape of its Gram, without making it."""
    weight = module.get_parameter("weight")
    if isinstance(module, Stacked):
        return module.experts, module.matrices.shape[2]
    if is_transposed(module):
        return 1, weight.shape[0]
    outputs = int(module.out_channels) if isinstance(module, _ConvTransposeNd) else len(weight)
    return conv_groups(module), weight.numel() // outputs


def outputs_of(module: nn.Module) -> int:
    """The number of output channels of an operator."""
    weight = module.get_parameter("weight")
    return weight.shape[1] if is_transposed(module) else len(weight)


def write_weight(module: nn.Module, matrix: Tensor) -> None:
    """Inverse of :func:`weight_matrix`: store ``(G, out / G, d)`` in the module, in the module's dtype."""
    if isinstance(module, Stacked):
        module.matrices.data.copy_(matrix)
        return
    weight = module.get_parameter("weight")
    shape = outputs_first(module, weight).shape
    weight.data.copy_(as_stored(module, matrix.reshape(shape)))


def absorb_mean(model: nn.Module, reader: str, sink: str, shift: Tensor) -> None:
    """Give a reader's lost mean output, ``shift`` float64 ``(out,)``, back at its sink, in place.

    ``sink`` is ``"bias"`` (the shift is added to the reader's own) or the name of the BatchNorm behind it (the shift is
    taken from its running mean). A BatchNorm without statistics subtracts the batch's own: nothing is lost there.
    """
    if sink == "bias":
        bias: Tensor = operator_at(model, reader).bias.data  # type: ignore[assignment]
        bias.add_(shift.to(bias.dtype))
        return
    mean: Tensor | None = model.get_submodule(sink).running_mean  # type: ignore[assignment]
    if mean is not None:
        mean.data.sub_(shift.to(mean.dtype))


def norm_scale(norm: nn.Module) -> Tensor:
    """``|γ| / √(σ² + ε)`` of a BatchNorm, float64 ``(channels,)``; a millionth of the largest at least."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()  # type: ignore[operator]
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double().abs()  # type: ignore[operator]
    return scale.clamp_min(max(1e-6 * float(scale.max()), 1e-300))


def operator_modules(model: nn.Module, groups: Iterable[Group]) -> Iterator[tuple[str, nn.Module]]:
    """The distinct reader modules of some groups, in order of first appearance."""
    seen: set[str] = set()
    for group in groups:
        for piece in group.readers:
            if piece.module not in seen:
                seen.add(piece.module)
                yield piece.module, operator_at(model, piece.module)


def last_wide(tensor: Tensor) -> int:
    """The axis of a parameter along which components can stand: its last one of more than one element."""
    return max((d for d, size in enumerate(tensor.shape) if size > 1), default=tensor.ndim - 1)


def conv_groups(module: nn.Module) -> int:
    """Number of conv groups of an operator: 1 for everything but a grouped conv and experts' matrices."""
    if isinstance(module, Stacked):
        return module.experts
    return int(getattr(module, "groups", 1) or 1) if hasattr(module, "kernel_size") else 1


def reader_columns(module: nn.Module, index: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of a reader's weight matrix that belong to each component.

    ``index`` int64 ``(n, m)`` are input channels. Returns the conv group ``(n,)`` of each component and its columns
    ``(n, m * kernel positions)`` inside that conv group's matrix, in im2col order (channel, then kernel position).
    """
    kernel = 1
    for size in getattr(module, "kernel_size", ()):
        kernel *= int(size)
    groups = conv_groups(module)
    total = module.in_features if isinstance(module, Stacked) else int(getattr(module, "in_channels", 0))
    total = total or int(index.max()) + 1
    width = total // groups if groups > 1 else total
    if groups > 1:
        owner = index[:, 0] // width
        local = index % width
    else:
        owner, local = torch.zeros(len(index), dtype=torch.int64), index
    columns = local[:, :, None] * kernel + torch.arange(kernel)
    return owner, columns.reshape(len(index), -1)
