"""Follow the branches of a network from their last operator to the addition that joins them to the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modhifi.structure.operators import outputs_of
from modhifi.structure.torch_ops import METADATA, MOVEMENTS, OPERATIONS, operation_name, swap, tensors_in


@dataclass(frozen=True)
class Trail:
    """Where a tensor comes from: an operator (``module``) or an addition, with ``index`` of the origin's elements."""

    index: Tensor
    module: str | None
    addition: int | None = None
    norm: str | None = None
    gains: tuple[str, ...] = ()
    direct: bool = True  # nothing but movements, and for an operator its norm and scales, since the origin
    normed: bool = False  # a norm stands between the addition and here

    @property
    def origin(self) -> str | int | None:
        """The operator's name, or the number of the addition."""
        return self.addition if self.module is None else self.module


@dataclass(frozen=True)
class Addition:
    """Two paths meet at call number ``time``; ``trail`` is the branch's, ``size`` the elements of one sample.

    It is the ``number``-th addition that the module ``where`` makes itself; ``skip`` is the other path's trail.
    """

    time: int
    where: str
    trail: Trail | None
    size: int
    number: int = 0
    skip: Trail | None = None


@dataclass
class BranchWatcher(TorchFunctionMode):
    """Follows one forward pass on two samples."""

    model: nn.Module
    depth: dict[int, int] = field(default_factory=dict)
    trails: dict[int, Trail] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    operators: dict[str, tuple[int, bool, int, Trail | None, int]] = field(default_factory=dict)
    sinks: dict[str, str] = field(default_factory=dict)
    batchnorms: dict[str, int] = field(default_factory=dict)
    additions: list[Addition] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    # How many additions each module that is being run has made itself.
    made: list[int] = field(default_factory=lambda: [0])
    # The call behind which an origin is read: its own, its norm's, its activation's.
    read: dict[str | int | None, int] = field(default_factory=dict)
    ends: dict[str, Trail] = field(default_factory=dict)
    # The origins that are read behind an activation.
    bent: set[str | int | None] = field(default_factory=set)
    time: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in self.model.named_parameters()}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        if name in METADATA:
            return func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        before = [(self.depth.get(id(t)), self.trails.get(id(t)), self.names.get(id(t))) for t in inputs]
        out = func(*args, **kwargs)
        outputs = list(tensors_in(out))
        if not outputs:
            return out
        self.time += 1
        self.alive += [inputs, outputs]
        deepest = max((d for d, _, _ in before if d is not None), default=None)
        kind = OPERATIONS.get(name)
        with torch._C.DisableTorchFunction():
            trails: list[Trail | None]
            if kind in ("conv", "transposed conv", "linear"):
                deepest = (deepest or 0) + 1
                trails = [self.operator(name, args, kwargs, before, inputs, outputs[0], deepest)]
            elif kind == "sum":
                trails = [self.addition(before, inputs, outputs[0])]
            else:
                trails = self.follow(name, func, args, kwargs, before, inputs, outputs)
        for tensor, trail in zip(outputs, trails, strict=True):
            self.trails.pop(id(tensor), None)
            if deepest is not None:
                self.depth[id(tensor)] = deepest
            if trail is not None:
                self.trails[id(tensor)] = trail
        return out

    def operator(
        self, name: str, args: Any, kwargs: Any, before: list[Any], inputs: list[Tensor], out: Tensor, depth: int
    ) -> Trail | None:
        """A convolution or linear map starts a trail."""
        place = 2 if name == "addmm" else 1
        weight = args[place] if len(args) > place else kwargs.get("weight")
        owner, _, kind = self.names.get(id(weight), "").rpartition(".")
        if kind != "weight" or not owner:
            return None
        x = next((b for t, b in zip(inputs, before, strict=True) if b[0] is not None), None)
        biased = getattr(self.model.get_submodule(owner), "bias", None) is not None
        self.operators[owner] = (self.time, biased, out.numel() // 2, x[1] if x else None, depth)
        self.read[owner] = self.time
        self.ends[owner] = Trail(torch.arange(out.numel()).view(out.shape), owner)
        return self.ends[owner]

    def addition(self, before: list[Any], inputs: list[Tensor], out: Tensor) -> Trail | None:
        """Two moving operands join a branch to a stream, which starts a trail of its own."""
        number, self.made[-1] = self.made[-1], self.made[-1] + 1
        active = [(b, t) for b, t in zip(before, inputs, strict=True) if b[0] is not None]
        if len(active) < 2 or any(t.shape != out.shape for _, t in active):
            # A constant (a position embedding, a bias) changes no position.
            trail = active[0][0][1] if len(active) == 1 and active[0][1].shape == out.shape else None
            return trail if trail is not None and trail.module is None else None
        # The deeper operand is the branch, the other one the skip (which may end in an operator of its own).
        best = max(range(len(active)), key=lambda i: (active[i][0][0], active[i][0][1] is not None))
        trails = [b[1] for b, _ in active]
        where = self.path[-1] if self.path else ""
        self.additions.append(
            Addition(self.time, where, trails[best], out.numel() // 2, number, trails[1 - best] if best < 2 else None)
        )
        self.read[self.time] = self.time
        return Trail(torch.arange(out.numel()).view(out.shape), None, self.time)

    def follow(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        before: list[Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> list[Trail | None]:
        """The trails behind any other operation: movements carry the index along, what is not known ends them."""
        none: list[Trail | None] = [None] * len(outputs)
        kind = OPERATIONS.get(name)
        if kind in MOVEMENTS or kind in ("unchanged", "cast"):
            if len(inputs) == 1 and before[0][0] is None and before[0][2] and outputs[0].numel() == inputs[0].numel():
                self.names[id(outputs[0])] = before[0][2]  # a layer scale in another shape
            trail = before[0][1] if before else None
            if trail is None:
                return none
            if kind not in MOVEMENTS:
                return [trail] * len(outputs)
            # A view of the same elements, whatever the strides of the index are.
            move = Tensor.reshape if name == "view" else func
            try:
                moved = list(tensors_in(move(*swap(args, {id(inputs[0]): trail.index}), **kwargs)))
            except (RuntimeError, TypeError, IndexError):
                return none
            return [replace(trail, index=index) for index in moved] if len(moved) == len(outputs) else none
        trail = next((b[1] for b in before if b[0] is not None and b[1] is not None), None)
        if name == "batch_norm":
            return [self.batch_norm(before, trail)]
        if trail is None or len(outputs) != 1 or outputs[0].shape != trail.index.shape:
            return none
        # The class is erased behind an activation, where the stream is read, not before it.
        if kind == "activation" and trail.direct:
            self.read[trail.origin] = self.time
            self.bent.add(trail.origin)
        if trail.module is None:
            # On the way from the stream to the classifier only positions matter.
            single = sum(b[0] is not None for b in before) == 1
            in_place = kind in ("activation", "elementwise") or name in ("layer_norm", "rms_norm")
            return (
                [replace(trail, direct=False, normed=trail.normed or kind == "norm")] if single and in_place else none
            )
        others = [b for b in before if b[1] is not trail]
        if kind == "product" and len(others) == 1 and others[0][0] is None and others[0][2]:
            return [replace(trail, gains=(*trail.gains, others[0][2]))]
        return none

    def batch_norm(self, before: list[Any], trail: Trail | None) -> Trail | None:
        """The BatchNorm behind an operator takes its mean; at most one stands on a trail."""
        owners = {name.rpartition(".")[0] for _, _, name in before if name}
        if len(owners) != 1:
            return None
        owner = owners.pop()
        self.batchnorms[owner] = self.time
        if trail is None or trail.module is None or trail.norm or trail.gains:
            return replace(trail, direct=False, normed=True) if trail is not None and trail.module is None else None
        self.sinks.setdefault(trail.module, owner)
        behind = replace(trail, norm=owner)
        if trail.direct:
            self.read[trail.module], self.ends[trail.module] = self.time, behind
        return behind


def watch(model: nn.Module, example: Tensor, run: Callable[[Tensor], Any]) -> tuple[BranchWatcher, Any]:
    """What a watcher saw of ``run(example)``, a forward pass on two samples, and its output."""
    watcher = BranchWatcher(model)

    def enter(name: str) -> None:
        watcher.path.append(name)
        watcher.made.append(0)

    def leave() -> None:
        watcher.path.pop()
        watcher.made.pop()

    watcher.depth[id(example)] = 0
    watcher.alive.append(example)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            stack.enter_context(module.register_forward_hook(lambda *_: leave()))
        with torch.no_grad(), watcher:
            output = run(example)
    return watcher, output


def stream_places(model: nn.Module, watcher: BranchWatcher, module: str, trail: Trail, size: int) -> Tensor:
    """The element of one sample's flattened stream that each output element of an operator ends up in.

    int64 ``(positions, out)``, -1 for positions that are cut away before; the stream has ``size`` elements.
    """
    layer: Any = model.get_submodule(module)
    produced, channels = watcher.operators[module][2], outputs_of(layer)
    place = torch.full((produced,), -1)
    first = trail.index.reshape(2, -1)[0]
    if int(first.max()) < produced:
        place[first] = torch.arange(size)
    if hasattr(layer, "kernel_size"):
        return place.view(channels, -1).T.contiguous()
    return place.view(-1, channels)


class Additions(TorchFunctionMode):
    """While active, hands the results of additions to callbacks.

    ``wanted`` has them by the module that adds and the number of the addition among those that it makes itself in one
    run, as :class:`Addition` counts them. A callback must not keep the tensor: what follows may write into it.
    """

    def __init__(self, model: nn.Module, wanted: Mapping[tuple[str, int], Callable[[Tensor], None]]) -> None:
        super().__init__()
        self.model, self.wanted = model, wanted
        self.running: list[tuple[str, int]] = [("", 0)]
        self.hooks = ExitStack()

    def __enter__(self) -> Additions:
        for name, module in self.model.named_modules():
            self.hooks.enter_context(
                module.register_forward_pre_hook(lambda *_, name=name: self.running.append((name, 0)))
            )
            self.hooks.enter_context(module.register_forward_hook(lambda *_: (self.running.pop(), None)[1]))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.hooks.close()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if OPERATIONS.get(operation_name(func)) == "sum" and (first := next(tensors_in(out), None)) is not None:
            name, number = self.running[-1]
            self.running[-1] = name, number + 1
            if (name, number) in self.wanted:
                self.wanted[name, number](first)
        return out


class Calls(TorchFunctionMode):
    """While active, hands the results of numbered calls of a forward pass to their callbacks.

    Calls are numbered as :class:`BranchWatcher` numbers them; the numbers start again at every ``with``.
    """

    def __init__(self, wanted: Mapping[int, Callable[[Tensor], None]]) -> None:
        super().__init__()
        self.wanted = wanted
        self.time = 0

    def __enter__(self) -> Calls:
        self.time = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if operation_name(func) not in METADATA and (first := next(tensors_in(out), None)) is not None:
            self.time += 1
            if self.time in self.wanted:
                self.wanted[self.time](first)
        return out
