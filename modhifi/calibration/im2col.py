"""The input rows of an operator: tokens, or patches of an image in im2col order."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.structure.library_layers import is_same_padded
from modhifi.structure.operators import conv_groups


def spread_positions(total: int, wanted: int, start: int, count: int, seed: int) -> Tensor:
    """Which of ``total`` positions to look at in samples ``start .. start + count``: int64 ``(count, wanted)``.

    A seeded permutation is dealt out in turn, so a sample's positions depend only on the seed and on its number, not
    on batches or processes, and all positions are visited equally often.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed * 1_000_003 + total))
    offsets = (torch.arange(start, start + count) * wanted)[:, None] + torch.arange(wanted)
    return order[offsets % total]


def reader_rows(module: nn.Module, x: Tensor, positions_for: Any = None, keep: Tensor | None = None) -> Tensor:
    """The input rows of an operator as ``(G, d, rows)``.

    ``x`` is the operator's input; ``positions_for(total)`` returns int64 ``(batch, p)`` positions to take, or None for
    all; ``keep`` bool, one for each row of ``x``, masks padding tokens out, of inputs that have a row for each token.
    """
    if not hasattr(module, "kernel_size"):
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        if keep is not None and keep.numel() == rows.shape[0] * rows.shape[1]:
            return rows.reshape(-1, x.shape[-1])[keep.reshape(-1).to(x.device)].float().T[None]
        chosen = positions_for(rows.shape[1]) if positions_for else None
        if chosen is not None:
            rows = torch.stack([r[i] for r, i in zip(rows, chosen.to(x.device), strict=True)])
        return rows.reshape(-1, x.shape[-1]).float().T[None]
    x, kernel, stride, dilation = _padded(module, x)
    batch, channels = x.shape[:2]
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    strides = [math.prod(x.shape[2 + i + 1 :]) for i in range(len(kernel))]
    corner, offset = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for size, step, k, s, d in zip(sizes, strides, kernel, stride, dilation, strict=True):
        corner = (corner[:, None] + torch.arange(size) * s * step).reshape(-1)
        offset = (offset[:, None] + torch.arange(k) * d * step).reshape(-1)
    chosen = positions_for(len(corner)) if positions_for else None
    flat = x.reshape(batch, channels, -1)
    pieces = []
    for item in range(batch):
        at = corner if chosen is None else corner[chosen[item]]
        index = (offset[:, None] + at).reshape(-1).to(x.device)
        pieces.append(flat[item].index_select(1, index).reshape(channels * len(offset), len(at)))
    groups = conv_groups(module)
    return torch.cat(pieces, 1).float().reshape(groups, channels * len(offset) // groups, -1)


def _padded(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    kernel, stride, dilation = tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
    if is_same_padded(module):
        # Whoever has such a layer has timm in memory; without one, importing it takes seconds.
        from timm.layers import pad_same

        x = pad_same(x, list(kernel), list(stride), list(dilation))
    elif any(pads := module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, list(pads), mode=mode)
    return x, kernel, stride, dilation
