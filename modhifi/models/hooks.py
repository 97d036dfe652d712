"""Let a model do something else than usual for a while: hooks, stand-ins, batch statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def only_input(args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What a layer is given, whether its caller names it or not."""
    given: Tensor = args[0] if args else next(iter(named.values()))
    return given


@contextmanager
def batch_statistics(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Let every BatchNorm normalise by its batch while its running statistics stay untouched.

    The outputs of each BatchNorm then have the channel means and variances that the stored affine parameters
    prescribe, whatever is fed in (docs/method.md, synthetic data).
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and active
    ]
    before = [(m.momentum, m.num_batches_tracked.clone() if m.num_batches_tracked is not None else None) for m in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.training, norm.momentum = False, momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module's forward is the given function; behind, what it was, even where the module had its own."""
    kept = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in kept.items():
            del module.forward
            if own is not None:
                module.forward = own
