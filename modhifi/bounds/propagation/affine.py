"""Linear operators on the ladder: their constants before and after the edit, folded with the norm behind them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modhifi.bounds.operator_norms import conv_norm, gram_norm, spectral_norm
from modhifi.bounds.propagation.interval import UP, Bound, settle_nan, slice_norm, times

# Above this side a Gram iteration replaces the eigenvalue solve: at most 1 % above the norm, and far cheaper.
LARGE = 1024
# Convolutions of no more inputs or outputs than this are written out as a matrix: exact, where the torus is loosest.
WRITTEN_OUT = 512


@dataclass(frozen=True)
class ErrorSource:
    """One modified layer where it was run: its error on each sample, and what is needed to bound it on every input.

    ``errors`` float64 (b,) is ``|f_k(z) - g_k(z)|`` on clean activations, behind the norm that follows; ``squared`` the
    sum of their squares. ``reach`` times the radius of the input box is how far the error can exceed that at the
    box's centre.
    """

    where: str
    parameters: tuple[str, ...]
    errors: Tensor
    squared: float
    reach: float


@dataclass(frozen=True)
class Norms:
    """Operator norms computed so far, by content: every batch of a walk meets the same weights again.

    ``whole_box`` False leaves out what only the every-input form of R1 needs.
    """

    whole_box: bool = True
    known: dict[bytes, float] = field(default_factory=dict)

    def of(self, kind: str, weight: Tensor, options: dict[str, Any]) -> float:
        """An upper bound of an operator's norm; see :func:`operator_norm` for ``kind``."""
        data = weight.detach().cpu().contiguous().numpy().tobytes()
        key = hashlib.blake2b(data + repr((kind, weight.shape, sorted(options.items()))).encode()).digest()
        if key not in self.known:
            self.known[key] = operator_norm(kind, weight, options)
        return self.known[key]


def operator_norm(kind: str, weight: Tensor, options: dict[str, Any]) -> float:
    """An upper bound of the norm of a "matrix" (out, in), a "conv" kernel or a "scale" of channels."""
    if kind == "scale":
        return float(weight.abs().max()) * (1 + 1e-12) if weight.numel() else 0.0
    if kind == "matrix" or options["groups"] == 1:
        used = weight.flatten(2).abs().amax(2) if kind == "conv" else weight.abs()
        weight = weight[used.amax(1) > 0][:, used.amax(0) > 0]
        if weight.numel() == 0:
            return 0.0
    if kind == "matrix":
        return gram_norm(weight) if min(weight.shape) > LARGE else spectral_norm(weight)
    if options["groups"] == 1 and max(weight.shape[:2]) * math.prod(options["size"]) <= WRITTEN_OUT:
        return spectral_norm(_matrix(weight, **options))
    return conv_norm(weight, **options)


def _matrix(weight: Tensor, size: Sequence[int], **options: Any) -> Tensor:
    """A convolution as a matrix (inputs, outputs), float64: what it makes of each unit input."""
    count = weight.shape[1] * math.prod(size)
    units = torch.eye(count, dtype=torch.float64).reshape(count, weight.shape[1], *size)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    return convolve(units, weight.double(), **options).flatten(1)


@dataclass(frozen=True)
class Affine:
    """A linear operator of the original (``dense``) and of the modified network (``edited``), float64."""

    kind: str
    dense: Tensor
    edited: Tensor
    options: dict[str, Any]
    norms: Norms

    def lip(self) -> float:
        """The norm of the original's operator; infinite where only the edited network is bounded."""
        return self.norms.of(self.kind, self.dense, self.options) if self.norms.whole_box else math.inf

    def constant(self) -> float:
        """The norm of the edited operator."""
        return self.norms.of(self.kind, self.edited, self.options)

    def gap(self) -> float:
        """The norm of what the edit changed; infinite where only walked samples are bounded."""
        return self.norms.of(self.kind, self.dense - self.edited, self.options) if self.norms.whole_box else math.inf

    def folded(self, dense: Tensor, edited: Tensor) -> Affine:
        """With the factors (channels,) of a norm behind it."""
        shape = [-1] + [1] * (self.dense.ndim - 1)
        return replace(self, dense=self.dense * dense.reshape(shape), edited=self.edited * edited.reshape(shape))


@dataclass
class Pending:
    """An affine operation whose bound is settled when something other than a norm or an activation reads it.

    ``x`` bounds its input; ``clean`` is the original's output, ``moved`` that of the modified operator on the same
    clean input (the same tensor where nothing was modified).
    """

    affine: Affine | None
    x: Bound
    clean: Tensor
    moved: Tensor
    parameters: tuple[str, ...]
    where: str
    form: str
    moving: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    _settled: Bound | None = None

    @property
    def gap(self) -> float:
        """The norm of what the edit changed; see :meth:`Affine.gap`."""
        return self.affine.gap() if self.affine is not None and self.modified else math.inf

    @property
    def modified(self) -> bool:
        """Whether the operator is another one in the edited network."""
        return self.moved is not self.clean

    def shape(self) -> list[int]:
        """The shape of the radius behind it: that of its input, or a radius for each token where that is still."""
        axes = list(self.x.radius.shape)
        if not bool((self.x.radius > 0).any()) and self.form == "tokens":
            axes = [*self.clean.shape[:-1], 1]
        axes[0] = self.clean.shape[0]
        return axes

    def own(self) -> Tensor:
        """The operator's own error on the clean input, as a radius."""
        return slice_norm(self.moved - self.clean, self.shape())

    def settled(self, add_source: Callable[[Pending, Tensor], int]) -> Bound:
        """The bound behind the operator, made once; ``add_source`` gives its own error a number."""
        if self._settled is None:
            assert self.affine is not None
            moving = bool((self.x.radius > 0).any()) or bool(self.x.reach)
            constant = self.affine.constant() if moving else 0.0
            lip = times(self.x.lip, self.affine.lip()) if self.x.lip not in (0.0, math.inf) else self.x.lip
            self.moving = settle_nan(self.x.radius * constant * UP)
            bound = self.x.scaled(self.moving, constant, 1.0)
            bound = replace(bound, lip=lip)
            if self.modified:
                own = self.own()
                number = add_source(self, own)
                bound = Bound(settle_nan(bound.radius + own) * UP, {**bound.reach, number: 1.0}, lip)
            self._settled = bound
        return self._settled

    def activated(self, func: Callable[[Tensor], Tensor], out: Tensor, slope: float, settled: Bound) -> Bound:
        """Behind an elementwise activation: its slope, and its own error measured behind it."""
        bound = settled.scaled(settled.radius * slope * UP, slope)
        if not self.modified:
            return bound
        own = slice_norm(func(self.moved) - out, self.shape())
        return replace(bound, radius=torch.minimum(bound.radius, settle_nan(self.moving * slope + own) * UP))


def conv_options(x: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> dict[str, Any]:
    """The arguments of :func:`conv_norm` for a convolution of ``x``."""

    def plain(value: Any) -> Any:
        return value if isinstance(value, (int, str)) else tuple(_ints(value))

    return {
        "size": tuple(x.shape[2:]),
        "stride": plain(stride),
        "padding": plain(padding),
        "dilation": plain(dilation),
        "groups": int(groups),
    }


def _ints(values: Sequence[int]) -> Sequence[int]:
    return [int(v) for v in values]
