"""Exporting an edited model to one file that runs without modhifi, checked against the model."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.artifacts.exports import EXPORTS
from modhifi.errors import GateFailed, ModhifiError
from modhifi.models.hub import explained
from modhifi.models.loaded import LoadedModel, main_output
from modhifi.models.packing import Unpacked

TOLERANCE = 1e-4


class MainOutput(nn.Module):
    """The model, with ``options``, as a function of the input batch alone, which returns the main output alone."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        caches = getattr(getattr(model, "config", None), "use_cache", None) is not None
        self.options = {**options, "use_cache": False} if caches else options

    def forward(self, input: Tensor) -> Tensor:
        return main_output(self.model(input, **self.options))


def require_export(loaded: LoadedModel, formats: Iterable[str]) -> None:
    """Raises ModhifiError, before any work, where a model made from ``loaded`` is none for one of the formats."""
    for name in formats:
        _require(loaded.of_one_batch(loaded.model), name)


def _require(model: nn.Module, format_name: str) -> None:
    if isinstance(model, Unpacked):
        raise ModhifiError(f"a file of {format_name} has one input, and this model reads several; run it in torch")
    dtypes = EXPORTS[format_name].dtypes
    held = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if dtypes and held - {*dtypes}:
        raise ModhifiError(
            f"{format_name} takes weights in {', '.join(dtypes)}, and this model has {', '.join(sorted(held))}; leave "
            "out the export, or prune a copy of it in that dtype"
        )


@torch.no_grad()
def export(model: nn.Module, example: Tensor, path: str | Path, format_name: str) -> float:
    """Writes the model (eval mode, on the CPU) in one of the formats of :data:`EXPORTS`, with a dynamic batch axis.

    ``example`` is a batch of at least 2 inputs. The file is read back, run on batches of two sizes and compared with
    the model; returns the largest absolute difference. Raises ModhifiError for an unknown format, if packages are
    missing or the model cannot be exported, and GateFailed, leaving no file, if an output differs by more than 1e-4
    absolute plus 1e-4 of its size.
    """
    file_format = EXPORTS[format_name]
    file_format.check()
    _require(model, format_name)
    path = Path(path)
    wrapped = MainOutput(model).eval()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if example.is_floating_point():
        example = example.to(dtype)
    batches = [example, torch.cat([example, example[:1]])]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            # Under its final name: a file may refer by name to another one beside it that holds large weights.
            file = Path(folder) / path.name
            with explained(f"export to {format_name}"), _quiet():
                run = file_format.write(wrapped, example, file)
                pairs = [(wrapped(batch), run(batch)) for batch in batches]
            difference = max((expected.double() - outputs.double()).abs().max().item() for expected, outputs in pairs)
            if not all(
                torch.allclose(outputs, expected, rtol=TOLERANCE, atol=TOLERANCE) for expected, outputs in pairs
            ):
                raise GateFailed(
                    f"the exported {format_name} file differs from the model by {difference:.3g}; it is not kept"
                )
            for piece in Path(folder).iterdir():
                os.replace(piece, path.parent / piece.name)
    except OSError as error:
        raise ModhifiError(f"cannot write {path}: {error.strerror or error}; check space and permissions") from error
    return difference


@contextlib.contextmanager
def _quiet() -> Any:
    """Silences exporters, which print on stdout, where ``--json`` goes, and warn of their own deprecations."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
