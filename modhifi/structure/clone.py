"""Copies of models that are in the mode of the original."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn


def clone(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy, every module of it in training or evaluation mode as its original is.

    Some classes forget theirs when they are copied: graphs of torch.fx, layers that copy themselves by their arguments.
    ``shared`` are tensors that the copy holds as well, for a caller who replaces them and never writes into them.
    """
    return without_caches(in_modes_of(model, copy.deepcopy(model, {id(tensor): tensor for tensor in shared})))


def without_caches(model: nn.Module) -> nn.Module:
    """The model, in place, without the tensors that its modules keep in dictionaries called caches, one for a device.

    They were computed from weights as an earlier pass found them, such as biases of attention at every pair of places.
    What stands there under any other name may be all that there is of it, and stays.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_cache") and isinstance(value, dict):
                for key in [k for k, v in value.items() if isinstance(v, Tensor) and str(k) == str(v.device)]:
                    del value[key]
    return model


def in_modes_of(model: nn.Module, copied: nn.Module) -> nn.Module:
    """The copy, in place, with every module in the mode of the module of that name in ``model``."""
    copied.train(model.training)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        module.training = modes.get(name, model.training)
    return copied
