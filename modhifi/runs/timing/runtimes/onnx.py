"""``onnx``: ONNX Runtime on the CPU, of a model that is exported first or of a file."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from modhifi.artifacts.export import export
from modhifi.artifacts.exports import EXPORTS
from modhifi.errors import ModhifiError
from modhifi.models.hub import explained
from modhifi.runs.timing.runtimes.base import RUNTIMES, Program, Run, Runtime

if TYPE_CHECKING:
    from torch import Tensor, nn


def load(model: nn.Module, example: Tensor) -> Program:
    """Exports the model, and checks what it computes; raises ModhifiError off the CPU."""
    EXPORTS["onnx"].check()
    if example.device.type != "cpu":
        raise ModhifiError("ONNX Runtime is timed on the CPU; give --device cpu, or another --runtime")
    folder = Path(tempfile.mkdtemp(prefix="modhifi-"))
    export(model, example[:1].repeat(2, *[1] * (example.ndim - 1)), folder / "model.onnx", "onnx")
    program = open_file(folder / "model.onnx")
    # Every number of threads reads the file again.
    weakref.finalize(program, shutil.rmtree, folder, ignore_errors=True)
    return program


def open_file(path: Path) -> Program:
    """The program of an ONNX file; raises ModhifiError for one that ONNX Runtime does not read."""
    EXPORTS["onnx"].check()
    import onnxruntime

    def program(batch: Tensor, threads: int) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        with explained(str(path)):
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: batch.numpy()}
        with explained(str(path)):
            session.run(None, inputs)
        return lambda: session.run(None, inputs)[0]

    return program


RUNTIMES.register(Runtime("onnx", "ONNX Runtime on the CPU", "https://onnxruntime.ai", load, open_file))
