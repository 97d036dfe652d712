"""The rules of the tracer, one for each kind of operation, and the hook for operations that torch does not bring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

from torch import nn

from modhifi.errors import ModhifiError
from modhifi.structure.torch_ops import KINDS, OPERATIONS, Kind, operation_name
from modhifi.structure.tracing.placements import Placement, TracedCall
from modhifi.structure.tracing.watcher import Watcher

# What the outputs of a call carry, one for each of them, None for nothing; couplings are told to the watcher.
Rule = Callable[[Watcher, TracedCall], Sequence[Placement | None]]

RULES: dict[Kind, Rule] = {}
# Rules of single operations, by name or by class of a module: they go before that of the kind.
OWN_RULES: dict[str | type[nn.Module], Rule] = {}
# Kinds that a user may name: those that have a rule.
OPEN_KINDS = tuple(kind for kind in KINDS if kind not in ("metadata", "own"))


def rule_for(*kinds: Kind) -> Callable[[Rule], Rule]:
    """Make the function below the rule of some kinds of the table."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


def register_operation(fn: Callable[..., Any] | type[nn.Module] | str, rule: Kind | Rule) -> None:
    """Tell the tracer what an operation does with components, so that groups it touches can be pruned.

    ``fn``: a torch function, a custom operator (``torch.library.custom_op`` or an entry of ``torch.ops``), the class of
    a module that answers for all that runs inside it, or a name as a refusal prints it. ``rule``: a kind of torch's own
    operations that ``fn`` behaves like ("elementwise", "movement", "sum", ...), or a function of the watcher and the
    call that returns what each output carries; see ``modhifi/structure/tracing/README.md``. A later rule replaces an
    earlier one. A wrong one does no harm: every group is tried out against the masked model, and refused where they
    differ. Raises ModhifiError for an unknown kind and for Python functions, which are followed as they are.

    >>> import torch, modhifi
    >>> @torch.library.custom_op("example::bend", mutates_args=())
    ... def bend(x: torch.Tensor) -> torch.Tensor:
    ...     return x * x.sigmoid()
    >>> class Bend(torch.nn.Module):
    ...     def forward(self, x):
    ...         return bend(x)
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), Bend(), torch.nn.Linear(32, 2))
    >>> modhifi.prune(net, torch.randn(64, 8), ratio=0.5)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    modhifi.errors.ModhifiError: no group of this model can be pruned with these settings; 0: the operation ...
    >>> modhifi.register_operation(bend, "elementwise")
    >>> modhifi.prune(net, torch.randn(64, 8), ratio=0.5).model[0].out_features
    16
    """
    key = _key(fn)
    if callable(rule):
        OWN_RULES[key] = rule
        OPERATIONS.setdefault(key, "own")
    elif rule in OPEN_KINDS:
        OWN_RULES.pop(key, None)
        OPERATIONS[key] = rule
    else:
        raise ModhifiError(f"there is no kind of operation '{rule}'; choose one of {', '.join(OPEN_KINDS)}")


def _key(fn: Callable[..., Any] | type[nn.Module] | str) -> str | type[nn.Module]:
    """What `OPERATIONS` calls an operation: its name, or the class of a module."""
    if isinstance(fn, str):
        return fn
    if isinstance(fn, type) and issubclass(fn, nn.Module):
        return fn
    fn = cast(Callable[..., Any], getattr(fn, "_opoverload", fn))  # what torch.library.custom_op defined
    if isinstance(fn, FunctionType) and not fn.__module__.startswith("torch"):
        raise ModhifiError(
            f"'{fn.__qualname__}' is Python code, which is followed line by line; register the custom operator or the "
            "module that it calls"
        )
    return operation_name(fn)
