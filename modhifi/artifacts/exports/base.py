"""The description of an export format, and the registry of formats."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modhifi.errors import ModhifiError
from modhifi.registry import Registry

# The command line lists the formats, so neither this file nor one of theirs imports torch before it is needed.
if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ExportFormat:
    """A file format that holds a model and runs without modhifi.

    ``suffix`` ends the file's name. ``write`` takes the model, as a function of the input batch alone, an example batch
    and the path; it writes a file with a dynamic batch axis and returns the function that the file, read back, holds.
    ``packages`` are those that it needs beside torch, all of them in the ``extra``; ``dtypes`` are those of the weights
    that it takes, any where there are none.
    """

    name: str
    suffix: str
    summary: str
    write: Callable[[nn.Module, Tensor, Path], Callable[[Tensor], Tensor]]
    packages: tuple[str, ...] = ()
    extra: str = ""
    dtypes: tuple[str, ...] = ()
    source: str = ""

    def check(self) -> None:
        """Raises ModhifiError if a package is missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ModhifiError(
                f"exporting to {self.name} needs {', '.join(missing)}; run: pip install 'modhifi[{self.extra}]'"
            )


EXPORTS: Registry[ExportFormat] = Registry("kind of export")
