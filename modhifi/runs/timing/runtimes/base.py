"""The description of a runtime, and the registry of runtimes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modhifi.registry import Registry

# The command line lists the runtimes, so neither this file nor one of theirs imports torch before it is needed.
if TYPE_CHECKING:
    from torch import Tensor, nn

Run = Callable[[], object]
"""One forward pass on a batch that it holds; returns its output."""
Program = Callable[["Tensor", int], Run]
"""A model made ready for a runtime: from a batch, on the model's device, and a number of threads to a forward pass."""


@dataclass(frozen=True)
class Runtime:
    """A way to run a model.

    ``load`` takes a module, on its device, and an example batch, and makes the program that runs it; ``open`` does so
    for a file, None where the runtime reads none. ``operator`` runs one conv or linear layer alone, on a batch and with
    a number of threads. All raise ModhifiError where the model cannot be run so; ``check`` raises it where packages are
    missing.
    """

    name: str
    summary: str
    source: str
    load: Callable[[nn.Module, Tensor], Program]
    operator: Callable[[Any, Tensor, int], Run]
    open: Callable[[Path], Program] | None = None
    check: Callable[[], None] = lambda: None


RUNTIMES: Registry[Runtime] = Registry("runtime")
