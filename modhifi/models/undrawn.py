"""Construction of a model without its random numbers, where weights take their place."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

# Functions of torch.nn.init, and methods of tensors, that draw at random.
DRAWS = {f"{kind}_{shape}_" for kind in ("kaiming", "xavier") for shape in ("uniform", "normal")}
DRAWS |= {"uniform_", "normal_"}


class Undrawn(TorchFunctionMode):
    """Parameters stay what their memory holds where a constructor draws them at random.

    Weights take their place, and to draw billions takes minutes.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)
