"""The input rows of an operator: tokens, or patches of an image in im2col order."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from modhifi.calibration.accumulator import EXACT_IN_SINGLE
from modhifi.structure.library_layers import is_same_padded
from modhifi.structure.operators import conv_groups


@lru_cache(maxsize=64)
def _dealt(total: int, times: int, seed: int, device: torch.device | str) -> Tensor:
    """A seeded permutation of ``total`` positions, int64, that many times one after the other."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed * 1_000_003 + total))
    return order.repeat(times).to(device)


@lru_cache(maxsize=256)
def spread_positions(
    total: int, wanted: int, start: int, count: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Which of ``total`` positions to look at in samples ``start .. start + count``: int64 ``(count, wanted)``.

    A seeded permutation is dealt out in turn, so a sample's positions depend only on the seed and on its number, not
    on batches or processes, and all positions are visited equally often.
    """
    first = start * wanted % total
    order = _dealt(total, 1 + math.ceil(count * wanted / total), seed, device)
    return order.as_strided((count, wanted), (wanted, 1), first)  # a view: remembering it costs nothing


def reader_rows(module: nn.Module, x: Tensor, positions_for: Any = None, keep: Tensor | None = None) -> Tensor:
    """The input rows of an operator as ``(G, d, rows)``; half precision stays, all else becomes float32.

    ``x`` is the operator's input; ``positions_for(total)`` returns int64 ``(batch, p)`` positions to take, on the
    device of ``x``, or None for all; ``keep`` bool, one for each row of ``x``, masks padding tokens out, of inputs that
    have a row for each token. The rows share no memory with ``x``, which may be changed in place.
    """
    if x.dtype not in EXACT_IN_SINGLE:
        x = x.float()
    if not hasattr(module, "kernel_size"):
        return _token_rows(x, positions_for, keep)
    x, kernel, stride, dilation = _padded(module, x)
    corner, offset = _window(x.shape[2:], kernel, stride, dilation, x.device)
    if isinstance(module, _ConvTransposeNd):
        offset = offset.flip(0)
    chosen = positions_for(len(corner)) if positions_for else None
    index = offset + (corner if chosen is None else corner[chosen])
    rows = x.reshape(*x.shape[:2], -1).transpose(0, 1)[:, _numbers(len(x), x.device), index]
    groups = conv_groups(module)
    return rows.reshape(groups, x.shape[1] * len(offset) // groups, -1)


def output_rows(module: nn.Module, y: Tensor, positions_for: Any = None, keep: Tensor | None = None) -> Tensor:
    """What an operator puts out for the rows of :func:`reader_rows`, ``(G, out / G, rows)``; ``y`` is its output."""
    if y.dtype not in EXACT_IN_SINGLE:
        y = y.float()
    if not hasattr(module, "kernel_size"):
        return _token_rows(y, positions_for, keep)
    places = y.flatten(2).transpose(0, 1)
    chosen = positions_for(places.shape[2]) if positions_for else None
    if chosen is not None:
        places = places[:, _numbers(len(y), y.device), chosen]
    groups = conv_groups(module)
    return places.reshape(groups, y.shape[1] // groups, -1)


def _token_rows(x: Tensor, positions_for: Any, keep: Tensor | None) -> Tensor:
    rows = x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
    if keep is not None and keep.numel() == rows.shape[0] * rows.shape[1]:
        real = torch.nonzero(keep.reshape(-1))[:, 0].to(x.device)
        return rows.reshape(-1, x.shape[-1]).index_select(0, real).T[None]
    chosen = positions_for(rows.shape[1]) if positions_for else None
    rows = rows.clone() if chosen is None else rows[_numbers(len(rows), x.device), chosen]
    return rows.reshape(1, -1, x.shape[-1]).mT


@lru_cache(maxsize=64)
def _numbers(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device)[:, None]


@lru_cache(maxsize=64)
def _window(
    axes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Where in a flattened image each patch begins, ``(positions,)``, and its elements behind that, ``(k, 1, 1)``."""
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(axes, kernel, stride, dilation, strict=True)]
    strides = [math.prod(axes[i + 1 :]) for i in range(len(axes))]
    corner, offset = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for size, step, k, s, d in zip(sizes, strides, kernel, stride, dilation, strict=True):
        corner = (corner[:, None] + torch.arange(size) * s * step).reshape(-1)
        offset = (offset[:, None] + torch.arange(k) * d * step).reshape(-1)
    return corner.to(device), offset[:, None, None].to(device)


def _padded(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    kernel, stride, dilation = tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
    if isinstance(module, _ConvTransposeNd):
        return _spread(module, x), kernel, (1,) * len(stride), dilation
    if is_same_padded(module):
        # Whoever has such a layer has timm in memory; without one, importing it takes seconds.
        from timm.layers import pad_same

        x = pad_same(x, list(kernel), list(stride), list(dilation))
    elif any(pads := module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, list(pads), mode=mode)
    return x, kernel, stride, dilation


def _spread(module: Any, x: Tensor) -> Tensor:
    """What a plain convolution with the flipped kernel of a transposed one reads: zeros between elements and around."""
    geometry = list(zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True))
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    places: tuple[Any, ...] = (..., *(slice(None, None, s) for s in module.stride))
    spread[places] = x
    ends = [(d * (k - 1) - p, d * (k - 1) - p + more) for k, d, p, more in reversed(geometry)]
    return F.pad(spread, [size for pair in ends for size in pair])
