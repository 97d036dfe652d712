"""Count the matrix work of a forward pass, kernel by kernel, and name the kernels whose work nobody can tell."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modhifi.structure.torch_ops import OPERATIONS, tensors_in

aten = torch.ops.aten


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula that FlopCounterMode calls with tensors, not with their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


@_raw
def _vector_product(*args: Any, out_val: Any, **_: Any) -> int:
    matrices = [t for t in tensors_in(args)][-2:]
    return 2 * int(matrices[0].numel())


@_raw
def _sum_of_products(addend: Tensor, first: Tensor, second: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    return 2 * first.numel() * second.shape[-1]


@_raw
def _trilinear(*args: Any, out_val: Any, **_: Any) -> int:
    """One multiply-add for each product of three elements; each factor lacks some of the axes."""
    shapes = []
    for tensor, missing in zip(args[:3], args[3:6], strict=True):
        for axis in sorted(missing):
            tensor = tensor.unsqueeze(axis)
        shapes.append(tensor.shape)
    return 2 * int(math.prod(torch.broadcast_shapes(*shapes)))


@_raw
def _one_layer(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """One direction of one recurrent layer: both of its matrices at every step of every sample."""
    return 2 * math.prod(x.shape[:-1]) * (w_input.numel() + w_hidden.numel())


@_raw
def _all_layers(x: Tensor, weights: list[Tensor], *_: Any, out_val: Any, **__: Any) -> int:
    return 2 * math.prod(x.shape[:-1]) * sum(w.numel() for w in weights if w.ndim == 2)


@_raw
def _grouped_product(first: Tensor, second: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """Rows of ``first`` meet the matrix of their expert."""
    stacks = len(first) if first.ndim == 3 and second.ndim == 2 else 1
    return 2 * first.numel() * second.shape[-1] // stacks


# Kernels that torch's own counter does not know.
FORMULAS: dict[Any, Callable[..., int]] = {
    getattr(aten, name): formula
    for name, formula in {
        "mv": _vector_product,
        "addmv": _vector_product,
        "dot": _vector_product,
        "vdot": _vector_product,
        "addbmm": _sum_of_products,
        "_addmm_activation": _sum_of_products,
        "_trilinear": _trilinear,
        "_grouped_mm": _grouped_product,
        "_scaled_grouped_mm": _grouped_product,
        "mkldnn_rnn_layer": _one_layer,
        "_cudnn_rnn": _all_layers,
        "miopen_rnn": _all_layers,
    }.items()
    if hasattr(aten, name)  # not every version of torch has all
}
# What takes several tensors and multiplies no matrices, beside what torch itself calls pointwise or a reduction.
_MOVES = frozenset(
    """cat stack copy copy_ set_ scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_put
    index_put_ _index_put_impl_ _unsafe_index_put index_add index_add_ index_copy index_copy_ put_ slice_scatter
    select_scatter diagonal_scatter as_strided_scatter masked_scatter masked_scatter_ masked_select grid_sampler_2d
    grid_sampler_3d cudnn_grid_sampler searchsorted bucketize complex polar isin equal _prelu_kernel
    rrelu_with_noise native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training _batch_norm_no_update _batch_norm_with_update cudnn_batch_norm
    miopen_batch_norm _fused_rms_norm _weight_norm_interface linalg_cross resize_as_ _embedding_bag
    _embedding_bag_forward_only nms roi_align roi_pool ps_roi_align ps_roi_pool""".split()
)
# What works on one matrix, by the beginning of its name.
_SOLVERS = ("linalg_", "_linalg_", "_fft_", "cholesky", "lu_", "geqrf", "ormqr", "orgqr", "matrix_exp", "linear_")
_LIGHT = frozenset({"linalg_vector_norm", "linalg_cross", "_linalg_check_errors", "linalg_diagonal"})


@functools.cache
def _is_light(kernel: Any) -> bool:
    """Whether torch says of a kernel that it works element by element, or sums some up."""
    light = {torch.Tag.pointwise, torch.Tag.reduction}
    return any(light & set(getattr(kernel, overload).tags) for overload in kernel.overloads())


def does_matrix_work(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a kernel without a formula may multiply matrices: it is a custom one, a solver, or takes two of them."""
    namespace, _, name = kernel._qualified_op_name.partition("::")
    wide = [t for t in tensors_in((args, kwargs)) if t.is_floating_point() or t.is_complex()]
    if not wide or name in _MOVES | _LIGHT or _is_light(kernel):
        return False
    if namespace not in ("aten", "prim", "prims", "torchvision"):
        return OPERATIONS.get(f"{namespace}::{name}", "own") == "own"
    return name.startswith(_SOLVERS) or sum(t.ndim >= 2 for t in wide) >= 2


class WorkCounter(FlopCounterMode):
    """Counts while it is active: ``total`` floating-point operations, two for a multiply-add.

    ``uncounted`` names the kernels that multiply matrices, or may do so, and whose work no formula tells. Norms,
    activations and pooling count as nothing.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=FORMULAS)
        self.total = 0
        self.uncounted: dict[str, None] = {}

    def _count_flops(self, kernel: Any, out: Any, args: Any, kwargs: Any) -> Any:
        formula = self.flop_registry.get(kernel)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        elif hasattr(kernel, "_qualified_op_name") and does_matrix_work(kernel, args, kwargs):
            self.uncounted[kernel._qualified_op_name] = None
        return out


@contextmanager
def counting() -> Iterator[WorkCounter]:
    """Count the work done inside. Fused attention and transformer layers run as the kernels that they are made of."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), WorkCounter() as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
