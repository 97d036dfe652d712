"""Offloading: weights stay in main memory, and one block at a time is on the device that computes.

Models that accelerate has dispatched to the CPU or to disk come in here too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from modhifi.errors import ModhifiError


def own_copy(module: nn.Module) -> nn.Module:
    """Copies a module to the CPU, with real weights and without hooks, also one that accelerate has dispatched.

    Weights that accelerate keeps on disk are read into main memory, where the edited copies will be as well; those
    it keeps on the CPU are shared with the caller's module, which stays unchanged.
    """
    # torch copies no tensor that a gradient would flow through: weights that a norm computed, activations kept.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    hooked = [(name, m, hook) for name, m in module.named_modules() for hook in _hooks(m)]
    if not hooked:
        return copy.deepcopy(module, memo).cpu()
    memo |= {id(hook): hook for _, _, hook in hooked}
    for _, owner, hook in hooked:
        below = getattr(hook, "place_submodules", False)
        for leaf, tensor in [*owner.named_parameters(recurse=below), *owner.named_buffers(recurse=below)]:
            if tensor.is_meta and getattr(hook, "weights_map", None) is not None:
                memo[id(tensor)] = _same_kind(tensor, hook.weights_map[leaf])
    for tensor in [*module.parameters(), *module.buffers()]:
        if id(tensor) not in memo:
            memo[id(tensor)] = _same_kind(tensor, tensor.data)
    copied: nn.Module = copy.deepcopy(module, memo)
    for part in copied.modules():
        if "_hf_hook" in vars(part):
            # accelerate shadows forward, and the methods that would move a dispatched model
            shadowed = [key for key, value in vars(part).items() if callable(value) and hasattr(type(part), key)]
            for key in ("_hf_hook", "_old_forward", "hf_device_map", *shadowed):
                vars(part).pop(key, None)
    if callable(tie := getattr(copied, "tie_weights", None)):
        tie()
    return copied


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def _same_kind(tensor: Tensor, value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def let_visit(model: nn.Module, blocks: tuple[str, ...], device: torch.device | str) -> None:
    """Moves a model to a device, in place, except its blocks: their weights go there for each of their passes.

    ``blocks`` are names of modules. Copies of the model do likewise. Raises ModhifiError if there are no blocks.
    """
    if not blocks:
        raise ModhifiError("--offload needs a model made of blocks of one kind, which this is not; leave it out")
    inside = {id(t) for name in blocks for t in _tensors(model.get_submodule(name))}
    for tensor in _tensors(model):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    for name in blocks:
        block = model.get_submodule(name)
        block.forward = partial(_visit, block, type(block).forward)


def _visit(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    device = next((value.device for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)), None)
    with staying([block], device):
        return forward(block, *args, **kwargs)


@contextmanager
def staying(modules: Iterable[nn.Module], device: torch.device | None, written: bool = False) -> Iterator[None]:
    """Moves the modules' weights to a device until the block ends; ``written`` copies their new values back.

    With None as the device they stay where they are.
    """
    originals: list[tuple[Tensor, Tensor]] = []
    # A trace must not take the moves for operations of the model.
    with torch._C.DisableTorchFunction():
        for tensor in (t for module in modules for t in _tensors(module)):
            if device is not None and (moved := _carried(tensor, device)) is not None:
                originals.append((tensor, tensor.data))
                tensor.data = moved
    try:
        yield
    finally:
        with torch._C.DisableTorchFunction():
            for tensor, values in originals:
                tensor.data = values.copy_(tensor.data) if written else values


def _carried(tensor: Tensor, device: torch.device) -> Tensor | None:
    """The tensor's values on another device; None where they are there already."""
    return None if tensor.device == device else tensor.data.to(device)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
