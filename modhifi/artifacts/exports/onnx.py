"""``onnx``: a model for ONNX Runtime and the compilers that read ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from modhifi.artifacts.exports.base import EXPORTS, ExportFormat

if TYPE_CHECKING:
    from torch import Tensor, nn

# An ONNX file is one protobuf message, which cannot be larger than this; beyond it the weights lie in a second file.
LARGEST_MESSAGE = 2_000_000_000


def write(model: nn.Module, example: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    """Writes by torch's exporter and reads by ONNX Runtime, on the CPU."""
    import onnxruntime
    import torch

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


EXPORTS.register(
    ExportFormat(
        "onnx",
        ".onnx",
        "a model for ONNX Runtime; its tensors are called input and output",
        write,
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        dtypes=("float32",),  # others ONNX Runtime on the CPU cannot check
        source="https://onnx.ai",
    )
)
