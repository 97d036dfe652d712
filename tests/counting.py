"""Count how often operators compute, which is what a pass costs, and how many operations torch dispatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def counted(kind: type[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """How often each module of a kind computes its own forward; one that another function stands in for does not."""
    counts: Counter[nn.Module] = Counter()
    forward = kind.forward

    def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        counts[module] += 1
        return forward(module, *args, **kwargs)

    with patch.object(kind, "forward", counting):
        yield counts


class Dispatched(TorchDispatchMode):
    """Counts operations, and the bytes of those that only copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.copied = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self.copied += args[0].nbytes
        return func(*args, **(kwargs or {}))
