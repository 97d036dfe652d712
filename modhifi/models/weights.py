"""Checks of a checkpoint's weights (finite, in floating point, not quantised), and their hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from modhifi.cache import tensors_hash
from modhifi.disk import read_json
from modhifi.errors import ModhifiError
from modhifi.models import hub


def state_hash(model: nn.Module) -> str:
    """The SHA-256 over names, dtypes, shapes and bytes of a model's state dict, 64 hex digits."""
    return tensors_hash(model.state_dict())


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_weights(model: nn.Module, source: str) -> None:
    """Raises ModhifiError for quantised or complex weights, an adapter, and NaN or infinite values; names the first.

    Buffers may hold infinities, as attention masks and the limits of clamps do. Tensors on the meta device have no
    values to check.
    """
    _refuse_adapters(model, source)
    for name, module in model.named_modules():
        if any(map(is_lazy, module._parameters.values())):
            raise ModhifiError(f"{source}: module {name!r} has no weights yet; run the model once, and give it then")
        quantised = type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantized", "bitsandbytes"))
        # What adds in floating point stands there in networks that are only ready to be quantised.
        if (quantised and not type(module).__name__.endswith("FloatFunctional")) or hasattr(module, "qweight"):
            _refuse_quantised(source, f"module {name!r} is a {type(module).__name__}")
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for name, tensor in parameters.items():
        if tensor.is_complex():
            raise ModhifiError(f"{source}: parameter {name!r} is {tensor.dtype}; complex weights are not supported")
        if tensor.dtype not in FLOATS or type(tensor.data).__module__.startswith("torchao"):
            _refuse_quantised(source, f"parameter {name!r} is {tensor.dtype}")
    for name, tensor in (parameters | dict(model.named_buffers())).items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all()):
            continue  # told without a tensor of that size
        if name in parameters or bool(tensor.isnan().any()):
            raise ModhifiError(f"{source}: tensor {name!r} holds NaN or infinite values; repair the checkpoint")


def _refuse_adapters(model: nn.Module, source: str) -> None:
    """Raise ModhifiError for low-rank adapters beside a layer: their rank is no width of the model."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") or type(module).__module__.startswith("peft."):
            raise ModhifiError(
                f"{source} carries an adapter ({name or type(module).__name__}); merge the adapter first "
                "(merge_and_unload() of peft) and give the merged model"
            )


def refuse_quantised_config(directory: Path, source: str) -> None:
    """Raises ModhifiError if the directory's ``config.json`` says that the weights are quantised."""
    config = read_config(directory)
    for part in (config, config.get("text_config") or {}):
        if not isinstance(part, dict):
            raise ModhifiError(f"{directory / 'config.json'} is broken: text_config holds no keys; restore the file")
        if quantised := part.get("quantization_config") or part.get("compression_config"):
            if not isinstance(quantised, dict):
                _refuse_quantised(source, f"quantization_config: {quantised}")
            bits = quantised.get("bits") or ("4" if quantised.get("load_in_4bit") else None)
            method = quantised.get("quant_method", "an unnamed method")
            _refuse_quantised(source, f"quantization_config: {method}{f', {bits}-bit' if bits else ''}")


def refuse_quantised_files(directory: Path, source: str) -> None:
    """Raises ModhifiError if a safetensors file holds weights in integers or 8-bit floats.

    Copied into float parameters they would load without complaint, and without their scales.
    """
    for path in sorted(directory.glob("*.safetensors")):
        with hub.explained(source), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no dictionary
                kind = file.get_slice(name).get_dtype()
                if name.endswith("weight") and kind not in ("F64", "F32", "F16", "BF16"):
                    _refuse_quantised(source, f"tensor {name!r} of {path.name} is {kind}")


def read_config(directory: Path) -> dict[str, Any]:
    """Reads ``config.json``, an empty mapping if there is none; raises ModhifiError if it is not a JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise ModhifiError(f"{path} is not a JSON object; restore the file")
    return config


def _refuse_quantised(source: str, why: str) -> NoReturn:
    raise ModhifiError(f"{source} is already quantised ({why}); prune the full-precision model, then quantise")
