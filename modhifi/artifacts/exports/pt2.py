"""``pt2``: a program of torch.export, which torch alone loads and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from modhifi.artifacts.exports.base import EXPORTS, ExportFormat

if TYPE_CHECKING:
    from torch import Tensor, nn


def write(model: nn.Module, example: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    """Writes and reads by torch.export."""
    import torch

    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file)
    run: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    return run


EXPORTS.register(
    ExportFormat(
        "pt2", ".pt2", "a program of torch.export, which torch alone runs", write, source="https://pytorch.org"
    )
)
