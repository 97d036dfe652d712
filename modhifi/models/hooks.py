"""Temporary hooks of modules: read an input, stop a pass, replace a forward, normalise by the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modhifi.structure.recurrent import Gates


class StopForward(Exception):
    """The exception that ends a forward pass whose rest is not needed."""


def only_input(args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The first input of a layer, given by position or by name."""
    x: Tensor = args[0] if args else next(iter(named.values()))
    return x


def on_input(module: nn.Module, callback: Callable[[Tensor], None]) -> RemovableHandle:
    """Registers a hook that passes a layer's input to ``callback`` before the layer runs."""

    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        callback(only_input(args, named))

    if isinstance(module, Gates):
        return _on_steps(module, callback)
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_steps(matrix: Gates, callback: Callable[[Tensor], None]) -> RemovableHandle:
    """The same for a matrix of a recurrent layer, which reads the states of every step."""

    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        state = args[1] if len(args) > 1 else named.get("hx")
        callback(matrix.rows(only_input(args, named), state))

    return matrix.place[0].register_forward_pre_hook(hook, with_kwargs=True)


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks when the block ends."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


@contextmanager
def stop_before(module: nn.Module) -> Iterator[list[Tensor]]:
    """Ends a forward pass where the module begins; the list that this yields then holds the module's input."""
    inputs: list[Tensor] = []

    def stop(x: Tensor) -> None:
        inputs.append(x)
        raise StopForward

    with on_input(module, stop), suppress(StopForward):
        yield inputs


@contextmanager
def stop_behind(module: nn.Module) -> Iterator[list[Tensor]]:
    """Ends a forward pass where the module ends; the list that this yields then holds the module's output."""
    outputs: list[Tensor] = []

    def stop(_: nn.Module, args: object, output: Tensor) -> None:
        outputs.append(output)
        raise StopForward

    with module.register_forward_hook(stop), suppress(StopForward):
        yield outputs


@contextmanager
def batch_statistics(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Makes every BatchNorm normalise by its batch, with its running statistics untouched.

    The outputs of each BatchNorm then have the channel means and variances that the stored affine parameters
    prescribe, whatever the input (docs/method.md, synthetic data).
    """
    norms = list(_norms(model).values()) if active else []
    settings = [
        (m.momentum, m.num_batches_tracked.clone() if m.num_batches_tracked is not None else None) for m in norms
    ]
    for norm in norms:
        norm.training, norm.momentum = True, 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, settings, strict=True):
            norm.training, norm.momentum = False, momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


def normalises_by_batch(model: nn.Module) -> bool:
    """Whether a model has a BatchNorm that remembers statistics."""
    return bool(_norms(model))


def _norms(model: nn.Module) -> dict[str, Any]:
    """The BatchNorms that remember statistics, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kind) and m.running_mean is not None}


# The variance and the mean of a BatchNorm's input, each (channels,), by its name and the number of the batch.
Statistics = dict[tuple[str, int], tuple[Tensor, Tensor]]


@contextmanager
def shared_statistics(original: nn.Module, edited: nn.Module, seen: Statistics, number: int) -> Iterator[None]:
    """Makes the BatchNorms of a model normalise by the batch with that ``number``, and those of its edited copy by
    what the original's have ``seen`` of it.

    So both normalise alike, as by the statistics that they remember: of what an edit does to means and variances,
    nothing is undone. What was taken from a running mean of the copy is taken here as well.
    """
    own, copied = _norms(original), _norms(edited)

    def observe(name: str, forward: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
        seen[name, number] = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
        return forward(x, *args)

    def reuse(name: str, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        norm, (variance, mean) = copied[name], seen[name, number]
        kept = norm.running_mean, norm.running_var
        norm.running_mean, norm.running_var = mean + kept[0] - own[name].running_mean, variance
        try:
            return forward(*args)
        finally:
            norm.running_mean, norm.running_var = kept

    forwards = {norm: partial(observe, name, norm.forward) for name, norm in own.items()}
    forwards |= {norm: partial(reuse, name, norm.forward) for name, norm in copied.items()}
    with batch_statistics(original), standing_in(forwards):
        yield


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replaces each module's forward by the given function until the block ends."""
    own_forwards = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in own_forwards.items():
            del module.forward
            if own is not None:
                module.forward = own


@contextmanager
def module_by_module(model: nn.Module) -> Iterator[None]:
    """Torch's own encoder runs without its fast path, whose nested tensors neither hooks nor stand-ins can read."""
    before = torch.backends.mha.get_fastpath_enabled()
    plain = not any(isinstance(module, nn.TransformerEncoder) for module in model.modules())
    torch.backends.mha.set_fastpath_enabled(before and plain)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
