"""The one table of torch's operations: of which kind each is, under all the names that torch calls it by.

Whoever follows a forward pass asks this table: the tracer (`modhifi.structure.tracing`) for the rule of a kind, the
branch watcher for sums and activations, the bounds (`modhifi.bounds.propagation`) for the names that a rule covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal[
    "activation",
    "elementwise",
    "unchanged",
    "cast",
    "reshape",
    "movement",
    "placed",
    "join",
    "sum",
    "difference",
    "product",
    "quotient",
    "binary",
    "matrix product",
    "attention",
    "conv",
    "transposed conv",
    "linear",
    "grouped product",
    "recurrent",
    "batch norm",
    "norm",
    "mixing",
    "pooling",
    "padding",
    "reduction",
    "vector norm",
    "creation",
    "metadata",
    "own",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

# One entry an operation: in-place variants and Python's operators are derived from it (see `spellings`).
_TABLE: dict[Kind, str] = {
    # a nonlinear function of each element
    "activation": """relu relu6 silu gelu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu selu celu mish
        softplus softsign log_sigmoid clamp clip prelu hardshrink softshrink tanhshrink threshold _threshold""",
    # other functions of each element
    "elementwise": """exp exp2 expm1 log log2 log1p sin cos tan acos asin atan sinh cosh sqrt rsqrt reciprocal abs neg
        square pow erf""",
    # in eval mode the same values
    "unchanged": """dropout feature_dropout dropout1d dropout2d dropout3d alpha_dropout contiguous clone detach
        requires_grad_ cpu cuda data""",
    "cast": "to float half bfloat16 double type type_as",
    # the same elements under another shape, which is said in numbers
    "reshape": "view reshape unflatten view_as reshape_as",
    # elements go to other places, or are repeated, wherever they stand
    "movement": """flatten permute transpose swapaxes swapdims movedim moveaxis unsqueeze squeeze expand expand_as
        broadcast_to repeat repeat_interleave tile flip t T mT H mH stack pixel_shuffle pixel_unshuffle""",
    # movements that name fixed places on an axis: after a cut they would take other channels
    "placed": """chunk split tensor_split split_with_sizes __getitem__ narrow select unbind roll unfold index_select
        gather take_along_dim""",
    "join": "cat concat concatenate",
    "sum": "add",
    "difference": "sub subtract rsub",
    "product": "mul multiply",
    "quotient": "div divide true_divide",
    # what else makes one element of one element of several tensors
    "binary": """__rtruediv__ __rdiv__ maximum minimum addcmul where masked_fill gt lt ge le eq ne greater less
        greater_equal less_equal not_equal logical_and logical_or""",
    "matrix product": "matmul __rmatmul__ bmm",
    "attention": "scaled_dot_product_attention",
    "conv": "conv1d conv2d conv3d",
    "transposed conv": "conv_transpose1d conv_transpose2d conv_transpose3d",
    "linear": "linear addmm",
    # rows of several experts with the matrix of each
    "grouped product": "grouped_mm _grouped_mm transformers::grouped_mm_fallback",
    "recurrent": "lstm gru rnn_tanh rnn_relu",
    "batch norm": "batch_norm instance_norm",
    # norms of each sample, which read the channel axis or a part of it as a whole
    "norm": "layer_norm rms_norm group_norm",
    # what else reads an axis as a whole
    "mixing": "softmax log_softmax normalize cumsum cumprod",
    "pooling": """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
        adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d
        interpolate upsample boolean_dispatch _max_pool2d max_pool2d_with_indices""",
    "padding": "pad",
    "reduction": "mean sum amax amin",
    # reductions which take their order before their axes
    "vector norm": "norm linalg_vector_norm",
    # new tensors that take nothing but a shape from their input
    "creation": "zeros_like ones_like empty_like full_like new_zeros new_ones new_full new_empty new_tensor",
    # what tells of a tensor without handing out its values
    "metadata": """size dim ndimension numel nelement __len__ stride storage_offset element_size get_device data_ptr
        is_contiguous is_floating_point is_complex __hash__ __repr__""",
}
# Python's operators; of those that swap their operands only where the order does not matter to any rule.
_OPERATORS = {
    "add": "__add__ __radd__ __iadd__",
    "sub": "__sub__ __rsub__ __isub__",
    "mul": "__mul__ __rmul__ __imul__",
    "div": "__div__ __truediv__ __idiv__ __itruediv__",
    "matmul": "__matmul__",
    "pow": "__pow__ __ipow__",
    "neg": "__neg__",
    "abs": "__abs__",
}
# Kinds in which every element stays where it is: only there an in-place variant is the same operation to a rule.
_IN_PLACE: frozenset[Kind] = frozenset(
    {"activation", "elementwise", "unchanged", "sum", "difference", "product", "quotient", "binary"}
)
MOVEMENTS: frozenset[Kind] = frozenset({"reshape", "movement", "placed", "join"})


def spellings(name: str) -> tuple[str, ...]:
    """Every name of an operation of the table: its own, its in-place variant where torch has one, its operators."""
    in_place = f"{name}_"
    exists = not name.startswith("__") and any(hasattr(place, in_place) for place in (torch, Tensor, F, torch._C._nn))
    return (name, *([in_place] if exists else []), *_OPERATORS.get(name, "").split())


def _spelled(kind: Kind) -> Iterator[str]:
    for name in _TABLE[kind].split():
        yield from spellings(name) if kind in _IN_PLACE or name in _OPERATORS else (name,)


# The kind of every operation by name, and of modules that are registered as one operation by their class.
OPERATIONS: dict[str | type[nn.Module], Kind] = {name: kind for kind in _TABLE for name in _spelled(kind)}


def names_of(*kinds: Kind) -> frozenset[str]:
    """The names of all operations of some kinds that are in the table now."""
    return frozenset(name for name, kind in OPERATIONS.items() if kind in kinds and isinstance(name, str))


METADATA = names_of("metadata")


def writes_in_place(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation overwrites its first argument: ``relu_``, ``x += y``, ``x[i] = y``, ``inplace=True``."""
    if isinstance(func, torch._ops.OpOverload):
        return bool(func._schema.is_mutable)
    name = operation_name(func)
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"))
    # torch.nn.functional hands its arguments on by name.
    return name.endswith("_") or kwargs.get("inplace") is True


@dataclass(frozen=True)
class Call:
    """One operation as it was run: the torch function ``func`` under its ``name``, and what it was given."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return list(tensors_in((self.args, self.kwargs)))

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument that may be given by its place or by its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


def operation_name(func: Callable[..., Any]) -> str:
    """The name of a torch function in the table.

    Of a tensor attribute (``x.T``, ``x.data``) that is the attribute's, of a custom operator ``namespace::name``.
    """
    if isinstance(func, torch._ops.OpOverload):
        namespace, _, name = func._schema.name.partition("::")
        return f"{name}.{func._overloadname}" if namespace == "aten" else f"{namespace}::{name}"
    if isinstance(func, torch._ops.OpOverloadPacket):
        namespace, _, name = func._qualified_op_name.partition("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", "an attribute"))
    return name


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def swap(value: Any, table: dict[int, Tensor]) -> Any:
    """The same nest of lists, tuples and dictionaries with other tensors in it, by ``id`` of those they replace."""
    if isinstance(value, Tensor):
        return table.get(id(value), value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(swap(v, table) for v in value)
    if isinstance(value, dict):
        return {k: swap(v, table) for k, v in value.items()}
    return value
