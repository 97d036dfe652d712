"""Streaming moments of what each reader reads: one mean and one Gram matrix, from forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from modhifi.models.hooks import batch_statistics, only_input
from modhifi.models.loaded import real_tokens
from modhifi.structure.operators import conv_groups

if TYPE_CHECKING:
    from modhifi.moment_cache import StoredSums

# Narrow readers see at least this many rows in all: pixels are far from Gaussian, and a few hundred of them overfit.
LEAST_ROWS = 4096


@dataclass(frozen=True)
class Moments:
    """First and second moment of a reader's input rows (tokens, or im2col patches), per conv group.

    ``n`` rows; ``mean`` float64 ``(G, d)``; ``cov`` float64 ``(G, d, d)``, the covariance around that mean. Columns are
    in im2col order: channel, then kernel position. Padding counts as the zeros it is.
    """

    n: int
    mean: Tensor
    cov: Tensor

    @property
    def gram(self) -> Tensor:
        """The uncentred second moment ``E[x xᵀ]``, float64 ``(G, d, d)``."""
        return self.cov + self.mean[:, :, None] * self.mean[:, None, :]

    def to(self, device: torch.device) -> Moments:
        return Moments(self.n, self.mean.to(device), self.cov.to(device))

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together, exact up to rounding (pairwise update)."""
        n = self.n + other.n
        gap = other.mean - self.mean
        share = other.n / n
        cov = self.cov * (1 - share) + other.cov * share
        cov += (share * (1 - share)) * gap[:, :, None] * gap[:, None, :]
        return Moments(n, self.mean + share * gap, cov)


class Accumulator:
    """Sums of ``x - shift`` and its products; ``shift`` is the first rows' mean, products float32, sums float64."""

    def __init__(self) -> None:
        self.n = 0
        self.shift: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """``rows`` ``(G, d, r)``: r new rows, stored as columns."""
        wide = torch.float64 if rows.device.type != "mps" else torch.float32
        if self.shift is None:
            self.shift = rows.mean(2)
            width = rows.shape[1]
            self.first = torch.zeros(rows.shape[:2], dtype=wide, device=rows.device)
            self.second = torch.zeros((rows.shape[0], width, width), dtype=wide, device=rows.device)
        rows = rows - self.shift[:, :, None]
        self.n += rows.shape[2]
        self.first += rows.sum(2, dtype=wide)
        turned = rows.transpose(1, 2)
        # only the upper triangle, strip by strip: the product is symmetric
        for strip in self._strips():
            self.second[:, strip, strip.start :] += rows[:, strip] @ turned[:, :, strip.start :]

    def _strips(self) -> list[slice]:
        width = self.first.shape[1]
        strip = max(512, width // 8)
        return [slice(start, min(start + strip, width)) for start in range(0, width, strip)]

    def finish(self) -> Moments:
        """The moments of everything added. Spends the sums, which become the result in place: Grams are large."""
        assert self.shift is not None
        first, second = self.first.double() / self.n, self.second.double()
        del self.second
        second.baddbmm_(first[:, :, None], first[:, None, :], beta=1 / self.n, alpha=-1)
        for strip in self._strips():
            second[:, strip.stop :, strip] = second[:, strip, strip.stop :].transpose(1, 2)
        return Moments(self.n, first + self.shift.double(), second)


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
    if isinstance(module, Conv2dSame):
        x = pad_same(x, list(kernel), list(stride), list(dilation))
    elif any(pads := module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, list(pads), mode=mode)
    return x, kernel, stride, dilation


class MomentCollector:
    """Owns forward hooks on readers and accumulates their moments while the model runs.

    Use as a context manager; call :meth:`start` before each batch with the number of its first sample. With
    ``rows_per_column`` r and ``samples`` in all, a reader of d columns looks at ``ceil(max(r d, 4096) / samples)``
    positions per sample (all of them where the sample has fewer): a Gram of d columns needs a small multiple of d
    rows, not every position of every image.
    """

    def __init__(
        self, readers: dict[str, nn.Module], *, samples: int, rows_per_column: int | None = None, seed: int = 0
    ) -> None:
        self.readers = readers
        self.samples = samples
        self.rows_per_column = rows_per_column
        self.seed = seed
        self.first = 0
        self.keep: Tensor | None = None
        self.sums = {name: Accumulator() for name in readers}
        self.handles: list[Any] = []

    def start(self, first: int, keep: Tensor | None = None) -> None:
        self.first, self.keep = first, keep

    def __enter__(self) -> MomentCollector:
        for name, module in self.readers.items():
            see = partial(self._see, name)
            self.handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, named, see=see: see(m, only_input(args, named)), with_kwargs=True
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def positions(self, module: nn.Module, x: Tensor, total: int) -> Tensor | None:
        """Which of an input's ``total`` rows per sample to look at, int64 ``(batch, p)``; None for all."""
        if self.rows_per_column is None:
            return None
        columns = module.get_parameter("weight")[0].numel() if hasattr(module, "kernel_size") else x.shape[-1]
        wanted = math.ceil(max(self.rows_per_column * columns, LEAST_ROWS) / self.samples)
        return None if wanted >= total else spread_positions(total, wanted, self.first, len(x), self.seed)

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        x = x.detach()
        rows = reader_rows(module, x, lambda total: self.positions(module, x, total), self.keep)
        self.sums[name].add(rows)

    def moments(self) -> dict[str, Moments]:
        return {name: sums.finish() for name, sums in self.sums.items() if sums.n}


@torch.no_grad()
def collect(
    model: nn.Module,
    run: Any,
    batches: Iterable[Tensor],
    readers: dict[str, nn.Module],
    *,
    numbers: Iterable[int] | None = None,
    samples: int,
    rows_per_column: int | None = None,
    use_batch_statistics: bool = False,
    seed: int = 0,
    stored: StoredSums | None = None,
) -> dict[str, Moments]:
    """Moments of every reader over ``batches`` of model-ready inputs, in one forward pass each.

    ``run(batch)`` runs the model; ``numbers`` says the number of each batch's first sample where they are not all of
    them. Raises nothing of its own; a reader that was never called is missing from the result.
    """
    collector = MomentCollector(readers, samples=samples, rows_per_column=rows_per_column, seed=seed)
    first = 0
    if stored is not None:
        stored.restore(collector.sums, readers)
        first = stored.done
    with collector, batch_statistics(model, use_batch_statistics):
        for batch, number in zip(batches, repeat(None) if numbers is None else numbers, strict=False):
            first = first if number is None else number
            collector.start(first, real_tokens(batch))
            run(batch)
            first += len(batch)
            if stored is not None:
                stored.keep(collector.sums, first)
    return collector.moments()
