"""Upper bounds of the norms of linear operators: dense matrices, convolutions, pooling.

Every number is computed in float64 and rounded up by more than its rounding error, so that it is a bound in float
arithmetic too. Power iteration appears nowhere: it estimates from below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from modhifi.errors import ModhifiError

# Worst-case analysis of a Gram product and a symmetric eigenvalue solve gives a relative error of a small multiple
# of eps times the number of entries; 64 leaves room for the discrete Fourier transform before them.
_ROUNDING = 64 * torch.finfo(torch.float64).eps
_CHUNK_ENTRIES = 2**22


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of a matrix (rows, columns), rounded up; exact through the smaller Gram matrix.

    Raises ModhifiError for NaN and infinity.
    """
    if matrix.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(matrix).all()):
        raise ModhifiError("a matrix holds NaN or infinity: no bound exists; check the model's weights")
    top = float(torch.linalg.eigvalsh(_smaller_gram(_double(matrix)))[-1])
    return math.sqrt(max(0.0, top)) * (1 + _ROUNDING * matrix.numel())


def gram_norm(matrix: Tensor, iterations: int = 8) -> float:
    """An upper bound of the largest singular value of a matrix (rows, columns) by Gram iteration.

    It takes matrix products alone, no factorisation. Raises ModhifiError for fewer than one iteration. The excess is at
    most a factor r^(1/2^(iterations+1)), r the smaller side. Source: Delattre, Barthélemy, Araujo, Allauzen, "Efficient
    bound of Lipschitz constant for convolutional layers by Gram iteration" (ICML 2023).
    """
    if iterations < 1:
        raise ModhifiError("Gram iteration needs at least one iteration; ask for iterations >= 1")
    gram = _smaller_gram(_double(matrix))
    log = 0.0
    for step in range(iterations):
        norm = float(torch.linalg.matrix_norm(gram))
        if norm == 0:
            return 0.0
        log += math.log(norm) / 2**step
        gram = gram / norm
        gram = gram @ gram
    return math.exp(log / 2) * (1 + _ROUNDING * matrix.numel())


def conv_norm(
    weight: Tensor,
    size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> float:
    """An upper bound of the operator norm of a convolution on inputs of a given size, in any number of axes.

    The input is laid on a torus large enough that the zero padding lies beside it; the padded operator is then a
    submatrix of a circular one, which a Fourier transform makes block diagonal. Inputs that meet under a stride are
    taken together as channels. `weight` is (out, in / groups, *kernel), `size` the spatial input size; `padding` also
    takes "same" and "valid". Raises ModhifiError where the kernel does not fit or shapes disagree. Source:
    docs/method.md, R1.
    """
    axes = len(size)
    if weight.ndim != axes + 2 or weight.shape[0] % groups:
        raise ModhifiError(f"weight {tuple(weight.shape)} does not fit {axes} axes and {groups} groups; check both")
    kernel = tuple(weight.shape[2:])
    strides, dilations = _per_axis(stride, axes), _per_axis(dilation, axes)
    pads = _pad_pairs(padding, kernel, dilations)
    tori = [_Axis.of(*axis) for axis in zip(size, kernel, strides, pads, dilations, strict=True)]
    return _torus_norm(weight, tori, groups)


def _pad_pairs(
    padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """The (left, right) padding of each axis from any form that torch's convolutions take."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ModhifiError(f"padding {padding!r} is unknown; use 'same', 'valid' or numbers")
    return tuple((pad, pad) for pad in _per_axis(padding, len(kernel)))


def avg_pool_norm(
    size: Sequence[int],
    kernel: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> float:
    """The exact operator norm of average pooling on inputs of a spatial size.

    It is the product of the norms along each axis.
    """
    axes = len(size)
    kernels, pads = _per_axis(kernel, axes), _per_axis(padding, axes)
    strides = kernels if stride is None else _per_axis(stride, axes)
    norm = 1.0
    for n, k, s, p in zip(size, kernels, strides, pads, strict=True):
        rows = F.avg_pool1d(_rows(n), k, s, p, ceil_mode, count_include_pad)
        norm *= spectral_norm(rows[:, 0])
    return norm


def adaptive_avg_pool_norm(size: Sequence[int], output: int | Sequence[int] = 1) -> float:
    """The exact operator norm of adaptive average pooling: 1 / sqrt(H W) for the global average over (H, W)."""
    norm = 1.0
    for n, m in zip(size, _per_axis(output, len(size)), strict=True):
        norm *= spectral_norm(F.adaptive_avg_pool1d(_rows(n), m)[:, 0])
    return norm


def max_pool_constant(
    kernel: int | Sequence[int], stride: int | Sequence[int] | None = None, dilation: int | Sequence[int] = 1
) -> float:
    """The Lipschitz constant of max pooling: the root of the number of windows that can contain one input.

    For instance 2 for a 3x3 kernel with stride 2.
    """
    axes = max((len(v) for v in (kernel, stride, dilation) if isinstance(v, Sequence)), default=2)
    kernels, dilations = _per_axis(kernel, axes), _per_axis(dilation, axes)
    strides = kernels if stride is None else _per_axis(stride, axes)
    windows = 1
    for k, s, d in zip(kernels, strides, dilations, strict=True):
        windows *= -(-k * math.gcd(s, d) // s)
    return math.sqrt(windows)


@dataclass(frozen=True)
class _Axis:
    """One axis of the torus: its length in strides, and for each tap its whole strides and its phase within one."""

    length: int
    steps: tuple[int, ...]
    phases: tuple[int, ...]

    @classmethod
    def of(cls, size: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int) -> _Axis:
        """The axis of a convolution; raises ModhifiError where the kernel does not fit the input."""
        reach = dilation * (kernel - 1)
        outputs = (size + sum(pad) - reach - 1) // stride + 1
        if outputs < 1:
            raise ModhifiError(f"a kernel that spans {reach + 1} does not fit an input of {size}; enlarge the input")
        overhang = max(0, stride * (outputs - 1) + reach - pad[0] - (size - 1))
        length = -(-max(size + max(pad[0], overhang), stride * outputs) // stride)
        steps = tuple(dilation * tap // stride for tap in range(kernel))
        # With a single step every frequency holds the same matrix up to a unit factor.
        return cls(1 if len(set(steps)) == 1 else length, steps, tuple(dilation * t % stride for t in range(kernel)))


def _torus_norm(weight: Tensor, tori: Sequence[_Axis], groups: int) -> float:
    scale = float(weight.detach().abs().max()) if weight.numel() else 0.0
    if not math.isfinite(scale):
        raise ModhifiError("a convolution's weight holds NaN or infinity: no bound exists; check the model's weights")
    if scale == 0:
        return 0.0
    blocks, steps = _polyphase(_double(weight) / scale, tori, groups)
    lengths = [axis.length for axis in tori]
    # A real kernel has conjugate spectra at f and -f: half of the last axis is enough.
    spans = [range(n) for n in lengths[:-1]] + [range(lengths[-1] // 2 + 1)]
    frequencies = torch.tensor(list(product(*spans)), dtype=torch.int64)
    flat = blocks.reshape(len(steps), -1).to(torch.complex128)
    coarse = flat.to(torch.complex64)
    best = 0.0
    for part in torch.split(frequencies, max(1, _CHUNK_ENTRIES // max(flat.shape[1], 1))):
        angle = torch.zeros(len(part), len(steps), dtype=torch.float64)
        for axis, length in enumerate(lengths):
            # Reduced modulo the length in integers, so that no angle loses digits.
            angle += (part[:, axis, None] * steps[None, :, axis] % length).double() * (2 * math.pi / length)
        waves = torch.polar(torch.ones_like(angle), -angle)
        # Single precision only chooses which frequencies can hold the maximum; their norms are computed in double.
        grams = _smaller_gram((waves.to(torch.complex64) @ coarse).reshape(-1, *blocks.shape[2:]))
        index = _contenders(grams, best)
        for one in index.tolist():
            kernel = flat.reshape(len(steps), groups, -1)[:, one % groups]
            gram = _smaller_gram((waves[one // groups] @ kernel).reshape(blocks.shape[2:]))
            best = max(best, float(torch.linalg.eigvalsh(gram)[-1]))
    return scale * math.sqrt(best) * (1 + _ROUNDING * weight.numel())


def _polyphase(weight: Tensor, tori: Sequence[_Axis], groups: int) -> tuple[Tensor, Tensor]:
    """The kernel as taps one stride apart: float64 (steps, groups, out, in x phases), and each step (steps, axes)."""
    kernel = weight.shape[2:]
    taps = list(product(*(range(k) for k in kernel)))
    step_of = [tuple(axis.steps[t] for axis, t in zip(tori, tap, strict=True)) for tap in taps]
    phase_of = [tuple(axis.phases[t] for axis, t in zip(tori, tap, strict=True)) for tap in taps]
    steps, phases = sorted(set(step_of)), sorted(set(phase_of))
    source = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], len(taps))
    blocks = torch.zeros(len(steps), *source.shape[:3], len(phases), dtype=torch.float64)
    for tap, (step, phase) in enumerate(zip(step_of, phase_of, strict=True)):
        blocks[steps.index(step), ..., phases.index(phase)] = source[..., tap]
    return blocks.flatten(-2), torch.tensor(steps, dtype=torch.int64)


def _contenders(grams: Tensor, at_least: float) -> Tensor:
    """The indices of Gram matrices (b, r, r), single precision, that may hold the largest eigenvalue above `at_least`.

    ||G^m||_F^(1/m) lies above the largest eigenvalue by at most a factor r^(1/2m): what stays below another's lower
    bound is discarded, and the others are squared again.
    """
    side = grams.shape[-1]
    # Far above the rounding of single precision, whose relative error is eps times the side for each product.
    margin = 1e-3 + 1e-5 * side
    index = torch.arange(len(grams))
    log = torch.zeros(len(grams), dtype=torch.float64)
    floor = math.log(at_least) if at_least > 0 else -math.inf
    power = grams
    for squarings in range(7 if side > 1 else 1):
        # As real numbers: torch's norm of complex matrices is a hundred times slower.
        norm = torch.linalg.vector_norm(torch.view_as_real(power).flatten(1), dim=1)
        log = log + norm.double().log() / 2**squarings
        floor = max(floor, float(log.max()) - math.log(side) / 2 ** (squarings + 1))
        keep = log >= floor - margin
        index, log, power, norm = index[keep], log[keep], power[keep], norm[keep]
        if len(index) <= 1 or squarings == 6:
            break
        power = power / norm.clamp(min=torch.finfo(norm.dtype).tiny)[:, None, None]
        power = power @ power
    return index


def _smaller_gram(matrices: Tensor) -> Tensor:
    wide = matrices.shape[-2] <= matrices.shape[-1]
    return matrices @ matrices.mH if wide else matrices.mH @ matrices


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)


def _rows(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)[:, None]


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)
