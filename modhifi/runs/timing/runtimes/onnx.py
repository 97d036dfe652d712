"""``onnx``: ONNX Runtime on the CPU, of a model that is exported first or of a file."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modhifi.artifacts.export import export
from modhifi.artifacts.exports import EXPORTS
from modhifi.errors import ModhifiError
from modhifi.models.hub import explained
from modhifi.runs.timing.runtimes.base import RUNTIMES, Program, Run, Runtime

# Of the format, so that older versions of ONNX Runtime read a layer too.
OPSET, IR_VERSION = 18, 9

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

    def program(batch: Tensor, threads: int) -> Run:
        with explained(str(path)):
            return _session(str(path), batch, threads)

    return program


def _session(content: str | bytes, batch: Tensor, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: batch.numpy()}
    session.run(None, inputs)
    return lambda: session.run(None, inputs)[0]


def operator(layer: Any, batch: Tensor, threads: int) -> Run:
    """The layer as a graph of one node or two, which takes no exporter's time."""
    EXPORTS["onnx"].check()
    from onnx import TensorProto, helper, numpy_helper

    weight, bias = layer.weight.detach(), layer.bias
    if hasattr(layer, "kernel_size"):
        padding = layer.padding if not isinstance(layer.padding, str) else [k // 2 for k in layer.kernel_size]
        geometry = {
            "strides": layer.stride,
            "pads": [*padding, *padding],
            "dilations": layer.dilation,
            "group": layer.groups,
        }
        kind = "Conv"
        if hasattr(layer, "output_padding") and layer.transposed:
            kind, geometry["output_padding"] = "ConvTranspose", layer.output_padding
        inputs = ["input", "weight", *(["bias"] if bias is not None else [])]
        nodes = [helper.make_node(kind, inputs, ["output"], **geometry)]
    else:
        weight = weight.T.contiguous()
        nodes = [helper.make_node("MatMul", ["input", "weight"], ["output" if bias is None else "product"])]
        if bias is not None:
            nodes.append(helper.make_node("Add", ["product", "bias"], ["output"]))
    constants = {"weight": weight} | ({} if bias is None else {"bias": bias.detach()})
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(batch.shape))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return _session(model.SerializeToString(), batch, threads)


RUNTIMES.register(
    Runtime(
        "onnx",
        "ONNX Runtime on the CPU",
        "https://onnxruntime.ai",
        load,
        operator,
        open_file,
        EXPORTS["onnx"].check,
    )
)
