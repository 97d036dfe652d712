"""Count how often operators compute, which is what a pass costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn


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
