"""Watch one forward pass: every torch function is seen, and beside each tensor stands which components it carries."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modhifi.errors import ModhifiError
from modhifi.structure.arguments import with_argument
from modhifi.structure.couplings import Couplings
from modhifi.structure.flops import WorkCounter, counting
from modhifi.structure.library_layers import is_frozen_norm
from modhifi.structure.operators import last_wide
from modhifi.structure.stacked import may_be_stacked
from modhifi.structure.torch_ops import METADATA, OPERATIONS, Kind, operation_name, tensors_in
from modhifi.structure.tracing.per_head import PerHead
from modhifi.structure.tracing.placements import Axis, Placement, TracedCall
from modhifi.structure.tracing.stacks import StackViews

# Kinds whose operations can make components of an input that carries none.
MAKERS: frozenset[Kind] = frozenset({"conv", "transposed conv", "linear", "recurrent", "own"})


class FrozenNorm(nn.Module):
    """Stands in the table for every library's BatchNorm of buffers; see :func:`is_frozen_norm`."""


class Watcher(TorchFunctionMode):
    """The placements of one pass, and what its rules find: couplings, operators, multiply-adds, obstacles.

    ``known`` is what modules have for each head, as the pass before has ``met`` it. With ``ranks`` components are
    channels inside heads, alike in all of them, and not heads.
    """

    def __init__(self, model: nn.Module, known: PerHead, ranks: bool = False) -> None:
        super().__init__()
        self.model, self.ranks = model, ranks
        self.known, self.met = known, PerHead()
        # What the modules being run were given.
        self.given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.couplings = Couplings()
        self.placements: dict[int, Placement | None] = {}
        self.alive: list[Tensor] = []
        # Tensors, by their ids, of which the next operation says whether their rows are heads or pieces.
        self.unsettled: set[int] = set()
        # Whether the pass met a tensor that nothing which it ran has made.
        self.unobserved = False
        self.uses: Counter[int] = Counter()
        # The operator that wrote a tensor, by the tensor's id, and the BatchNorms behind it with what they read.
        self.written_by: dict[int, str] = {}
        self.batchnorms: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.calls: Counter[str] = Counter()
        self.counter = WorkCounter()
        # Multiply-adds by operator, and those of all of them.
        self.macs: Counter[str] = Counter()
        self.claimed = 0
        self.biased: dict[str, bool] = {}
        self.obstacles: dict[str, str] = {}
        # The modules being run, each with the id of the tensor it received.
        self.path: list[tuple[str, int]] = []
        # How many modules being run answer for all that happens inside them.
        self.closed = 0
        self.samples = 0
        self.names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.names.setdefault(id(tensor), name)
            self.remember(tensor, None)
        for module in model.modules():
            for tensor in tensors_in(list(vars(module).values())):  # kept as plain attributes: fixed
                self.remember(tensor, None)
        self.parameters = {id(p) for p in model.parameters()}
        holders: dict[int, set[int]] = defaultdict(set)
        for name, tensor in model.named_parameters(remove_duplicate=False):
            holders[id(tensor)].add(id(model.get_submodule(name.rpartition(".")[0])))
        self.tied = {key for key, modules in holders.items() if len(modules) > 1}
        self.stacks = StackViews(
            {
                id(tensor): name
                for name, tensor in model.named_parameters()
                if may_be_stacked(model.get_submodule(name.rpartition(".")[0]), tensor) or _of_linear(model, name)
            }
        )

    # -- placements ------------------------------------------------------------------------------------------------
    def remember(self, tensor: Tensor, placement: Placement | None) -> None:
        """Set what a tensor carries; it is kept alive, as an ``id`` must not be given twice."""
        self.placements[id(tensor)] = placement
        self.alive.append(tensor)

    def placement(self, tensor: Tensor) -> Placement | None:
        """What a tensor carries; a free parameter gets components of its own, along its last wide axis.

        Free are parameters with one wide axis, and tables: those not called ``weight``, which layers multiply with.
        """
        if id(tensor) not in self.placements and not (tensor.is_floating_point() or tensor.is_complex()):
            self.remember(tensor, None)  # an index made in an earlier pass, which a library keeps
        if id(tensor) not in self.placements:
            self.unobserved |= self.couplings.count > 0  # what the model reads is older than anything in it
            self.couplings.freeze_everything(f"an operation before {self.where} could not be observed")
            self.remember(tensor, None)
        placement = self.placements[id(tensor)]
        if placement is None and self.names.get(id(tensor)) in self.known.tables and id(tensor) not in self.tied:
            name = self.names[id(tensor)]
            placement = Axis(1, self.couplings.rows(name, self.known.tables[name], 1))
            self.placements[id(tensor)] = placement
        if placement is None and id(tensor) in self.parameters and id(tensor) not in self.tied:
            wide, name = sum(size > 1 for size in tensor.shape), self.names[id(tensor)]
            owner = self.model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.RNNBase) and wide > 1:
                return placement  # the matrices are operators of their own
            produced = self.couplings.made.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
            if produced is not None and len(produced) == tensor.numel():
                return Axis(tensor.ndim - 1, produced)  # the layer's own, which goes with its rows
            if wide == 1 or (wide == 2 and tensor.ndim == 2 and name.rpartition(".")[2] != "weight"):
                dim = last_wide(tensor)
                placement = Axis(dim, self.couplings.parameter(name, tensor.shape[dim]))
                self.placements[id(tensor)] = placement
        return placement

    def looked_up(self, call: TracedCall) -> str | None:
        """The parameter of an operation ``table[:, index]``, whose rows are channels and whose columns are places."""
        if call.name != "__getitem__" or id(call.args[0]) not in self.parameters or call.args[0].ndim != 2:
            return None
        index = call.args[1]
        columns = isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None)
        return self.names[id(call.args[0])] if columns and isinstance(index[1], Tensor) else None

    def meets_heads(self, ids: Tensor, dim: int) -> None:
        """Something that carries nothing meets heads along its axis ``dim``: note what it could be made of."""
        if self.path and bool((ids >= 0).all()):
            name = self.path[-1][0]
            module = self.model.get_submodule(name)
            self.met.note(name, module, self.given[-1], ids, dim, lambda t: self.placements.get(id(t)) is None)

    def _seen(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a module is given, where arguments that hold something for each head carry components of their own."""
        for argument, (dim, heads) in self.known.arguments.get(name, {}).items():

            def carrying(value: Any, argument: str = argument, dim: int = dim, heads: int = heads) -> Any:
                if not isinstance(value, Tensor) or self.placements.get(id(value)) is not None:
                    return value
                if value.ndim <= dim or value.shape[dim] % heads:
                    return value  # another call of the module, with another form
                alias = value.view_as(value)
                ids = self.couplings.argument(f"{name}.{argument}", dim, heads)
                self.remember(alias, Axis(dim, ids.repeat(value.shape[dim] // heads)))
                return alias

            args, kwargs = with_argument(self.model.get_submodule(name), args, kwargs, argument, carrying)
        return args, kwargs

    @property
    def where(self) -> str:
        """The innermost module being run, as a refusal names it."""
        return self.path[-1][0] if self.path and self.path[-1][0] else "the top level"

    # -- refusals --------------------------------------------------------------------------------------------------
    def freeze(self, placement: Placement | None, reason: str) -> None:
        """Let the components of a placement stay, for a reason that is printed with the place."""
        if placement is not None:
            self.couplings.freeze(placement.ids.flatten(), f"{reason} ({self.where})")

    def refuse(self, call: TracedCall, reason: str) -> list[Placement | None]:
        """Let everything that a call's inputs carry stay; its outputs carry nothing."""
        for _, placement in call.carriers:
            self.freeze(placement, reason)
        return [None] * len(call.outputs)

    def unknown(self, call: TracedCall) -> list[Placement | None]:
        """Refuse a call that no rule understands."""
        return self.refuse(call, f"the operation '{call.name}' is not understood")

    # -- dispatch --------------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        if name in METADATA or self.closed:
            return func(*args, **kwargs)
        # An in-place operation overwrites the placement of its input: it is read before.
        placements = {id(tensor): self.placement(tensor) for tensor in tensors_in((args, kwargs))}
        before = self.counter.total
        out = func(*args, **kwargs)
        macs = (self.counter.total - before) // 2
        call = TracedCall(name, func, args, kwargs, name, list(tensors_in(out)), placements, macs)
        if call.outputs:
            self.follow(call)
        elif getattr(func, "__name__", "") != "__get__":
            self.unknown(call)
        return out

    def follow(self, call: TracedCall) -> None:
        """Set what the outputs of a call carry."""
        self.uses.update({id(t) for t in call.inputs})
        placements: Sequence[Placement | None] = [None] * len(call.outputs)
        with torch._C.DisableTorchFunction():
            of_experts = self.stacks.product(call.name, call.args, call.kwargs, call.inputs) is not None
            of_experts = of_experts or self.stacks.from_left(call.name, call.inputs) is not None
            if not of_experts and self.stacks.note(call.name, call.args, call.inputs, call.outputs[0]):
                self.alive.append(call.outputs[0])
        if of_experts or call.carriers or call.kind in MAKERS or self.looked_up(call) is not None:
            claimed = self.claimed
            # Component numbers are moved about in there: nothing of it is the model's work, or to be counted.
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                placements = self.rule(call)
            if call.carriers and (rest := call.macs - (self.claimed - claimed)) > 0:
                self.couplings.spend(rest, call.carriers[0][1].ids.flatten())
        if len(placements) != len(call.outputs):
            raise ModhifiError(
                f"the rule of '{call.name}' returned {len(placements)} placements for {len(call.outputs)} outputs; "
                "return one for each"
            )
        for tensor, placement in zip(call.outputs, placements, strict=True):
            self.remember(tensor, placement)

    def claim(self, module: str, call: TracedCall) -> None:
        """Count the multiply-adds of a call for an operator, whose widths they then scale with."""
        self.macs[module] += call.macs
        self.claimed += call.macs

    @abstractmethod
    def rule(self, call: TracedCall) -> Sequence[Placement | None]:
        """What the outputs of a call carry."""

    # -- modules ---------------------------------------------------------------------------------------------------
    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep ``path``, count, and let modules that are registered as one operation answer for what runs inside."""
        handles: list[Any] = []
        for name, module in self.model.named_modules():
            enter, leave = self._hooks(name, module)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        try:
            with counting() as self.counter:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.path.clear()
            self.given.clear()
            self.closed = 0

    def _hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., Any], Callable[..., None]]:
        key: type[nn.Module] = FrozenNorm if is_frozen_norm(module) else type(module)
        registered = key in OPERATIONS
        begun: list[int] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                args, kwargs = self._seen(name, args, kwargs)
            received = next(tensors_in((args, kwargs)), None)
            if not self.samples and received is not None and received.ndim:
                self.samples = len(received)
            self.path.append((name, id(received)))
            self.given.append((args, kwargs))
            begun.append(self.counter.total)
            self.closed += registered
            return (args, kwargs) if name in self.known.arguments else None

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self.closed -= registered
            macs = (self.counter.total - begun.pop()) // 2
            outputs = list(tensors_in(out))
            if registered and not self.closed and outputs:
                with torch._C.DisableTorchFunction():
                    placements = {id(tensor): self.placement(tensor) for tensor in tensors_in((args, kwargs))}
                    self.follow(TracedCall(key.__name__, module.forward, args, kwargs, key, outputs, placements, macs))
            self.path.pop()
            self.given.pop()

        return enter, leave


def _of_linear(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a linear layer."""
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(owner), nn.Linear)
