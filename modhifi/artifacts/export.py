"""An edited model as one file that runs without modhifi: ONNX, or a program of torch.export."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.errors import GateFailed, ModhifiError
from modhifi.models.hub import explained
from modhifi.models.loaded import main_output

TOLERANCE = 1e-4
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# An ONNX file is one protobuf message, which cannot be larger than this; beyond it the weights lie in a second file.
LARGEST_MESSAGE = 2_000_000_000
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}


class MainOutput(nn.Module):
    """The main output alone, as a function of the input batch alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        caches = getattr(getattr(model, "config", None), "use_cache", None) is not None
        self.options: dict[str, Any] = {"use_cache": False} if caches else {}

    def forward(self, input: Tensor) -> Tensor:
        return main_output(self.model(input, **self.options))


def check_export(kind: str) -> None:
    """Raise ModhifiError if this kind of file is unknown or its packages are missing: ask before the work."""
    if kind not in SUFFIXES:
        raise ModhifiError(f"unknown kind of export '{kind}'; use one of {', '.join(SUFFIXES)}")
    missing = [name for name in ONNX_PACKAGES if kind == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ModhifiError(f"exporting to ONNX needs {', '.join(missing)}; run: pip install 'modhifi[onnx]'")


@torch.no_grad()
def export(model: nn.Module, example: Tensor, path: str | Path, kind: str) -> float:
    """Write the model (eval mode, on the CPU) as an ``onnx`` or ``pt2`` file with a dynamic batch axis.

    ``example`` is a batch of at least 2 inputs. The file is read back, run (ONNX by ONNX Runtime) on batches of two
    sizes and compared with the model; returns the largest absolute difference. Raises ModhifiError if packages are
    missing or the model cannot be exported, and GateFailed, leaving no file, if an output differs by more than 1e-4
    absolute plus 1e-4 of its size.
    """
    check_export(kind)
    path = Path(path)
    wrapped = MainOutput(model).eval()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if example.is_floating_point():
        example = example.to(dtype)
    if kind == "onnx" and dtype != torch.float32:
        raise ModhifiError(f"ONNX Runtime on the CPU cannot check a model in {dtype}; prune a float32 copy of it")
    batches = [example, torch.cat([example, example[:1]])]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            # Under its final name: an ONNX file refers by name to the file that holds large weights.
            file = Path(folder) / path.name
            with explained(f"export to {kind}"), _quiet():
                run = _write_onnx(wrapped, example, file) if kind == "onnx" else _write_program(wrapped, example, file)
                pairs = [(wrapped(batch), run(batch)) for batch in batches]
            difference = max((ours.double() - theirs.double()).abs().max().item() for ours, theirs in pairs)
            if not all(torch.allclose(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE) for ours, theirs in pairs):
                raise GateFailed(f"the exported {kind} file differs from the model by {difference:.3g}; it is not kept")
            for piece in Path(folder).iterdir():
                os.replace(piece, path.parent / piece.name)
    except OSError as error:
        raise ModhifiError(f"cannot write {path}: {error.strerror or error}; check space and permissions") from error
    return difference


def _write_onnx(model: nn.Module, example: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    size = sum(t.nbytes for t in model.state_dict().values())
    torch.onnx.export(
        model,
        (example,),
        str(file),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["input"],
        output_names=["output"],
        external_data=size > LARGEST_MESSAGE,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(["output"], {"input": batch.numpy()})[0])


def _write_program(model: nn.Module, example: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file)
    run: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    return run


@contextlib.contextmanager
def _quiet() -> Any:
    """Exporters talk on stdout, which belongs to ``--json``, and warn of their own deprecations."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
