"""Float64 throughout: models that cast to float32 inside, as many an RMSNorm does, would blur what bounds say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modhifi.structure.torch_ops import names_of, operation_name

CASTS = names_of("cast")


def kept_double(name: str, args: Any, out: Any) -> Any:
    """What a torch function gave, or its input where it would only have narrowed float64."""
    narrowed = name in CASTS and isinstance(out, Tensor) and out.is_floating_point() and out.dtype != torch.float64
    return args[0] if narrowed and args[0].dtype == torch.float64 else out


class Double(TorchFunctionMode):
    """While active, no float64 tensor is cast to a narrower floating-point type."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kept_double(operation_name(func), args, func(*args, **(kwargs or {})))
