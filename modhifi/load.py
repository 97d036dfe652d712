"""Load a model from timm, transformers, a local directory or Python into one frozen ``LoadedModel``.

Nothing here unpickles code, and no code of a model's author runs unless ``trust_remote_code`` says so.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from modhifi import hub
from modhifi.bundled import MODELS, bundled
from modhifi.errors import ModhifiError
from modhifi.offload import own_copy

DESCRIPTIONS = ("config.json", "modhifi.json")
# Marks the places of a batch of token ids behind the end of a shorter text.
PADDING = -1
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured and edited, with what is needed to feed it.

    ``model`` is on the CPU, in eval mode, and none of its parameters requires a gradient. ``source`` is what was asked
    for (``timm:NAME``, ``hf:ORG/NAME``, a directory, ``module:CLASS``), ``framework`` timm, transformers or torch.
    ``kind`` is image (classifier or backbone), text (causal language model), encoder (other token models) or tensor
    (any module with a given example). ``example`` is a seeded batch of 2 model-ready inputs: normalised pixels
    ``(2, C, H, W)`` or token ids ``(2, 16)``. ``transform`` is the model's own evaluation preprocessing, PIL image to
    float32 ``(C, H, W)``. ``info`` is JSON-able: architecture, arguments, resolved commit, licence, versions, notes.
    """

    model: nn.Module
    source: str
    framework: str
    kind: str
    example: Tensor
    transform: Callable[[Image.Image], Tensor] | None
    tokenizer: Any | None
    labels: tuple[str, ...] | None
    info: dict[str, Any]

    def logits(self, batch: Tensor, model: nn.Module | None = None) -> Tensor:
        """The main output of one forward pass of ``model`` (default: this model) on a batch, axis 0 the batch.

        Logits where the model has them, otherwise its last hidden state or first output. The batch moves to the
        model's device, and pixels to its dtype; token ids of ``PADDING`` are masked out of the attention. Raises
        ModhifiError if the model returns no tensor.
        """
        return main_output(self._forward(batch, model))

    def run(self, batch: Tensor, model: nn.Module | None = None) -> None:
        """A pass of which only the inner activations are wanted: language models that can leave out their logits."""
        model = self.model if model is None else model
        spare = self.kind == "text" and "logits_to_keep" in inspect.signature(model.forward).parameters
        self._forward(batch, model, **({"logits_to_keep": 1} if spare else {}))

    def _forward(self, batch: Tensor, model: nn.Module | None, **more: Any) -> Any:
        model = self.model if model is None else model
        first = next(model.parameters(), None)
        if first is not None:
            batch = batch.to(first.device, first.dtype if batch.is_floating_point() else None)
        if self.kind == "text":
            more["use_cache"] = False  # a key-value cache would hold memory that a single pass never reads
        if (real := real_tokens(batch)) is not None:
            batch, more["attention_mask"] = batch.clamp(min=0), real.long()
        return model(batch, **more)


@dataclass(frozen=True)
class Preprocess:
    """PIL image of any mode to float32 ``(C, H, W)``; ``processor`` is transformers' own object, where there is one."""

    pipeline: Callable[[Image.Image], Tensor]
    mode: str
    processor: Any | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        return self.pipeline(to_mode(image, self.mode))


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image of any mode to ``RGB`` or ``L``, scaling 16-bit grey values, which Pillow would clip."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def real_tokens(batch: Tensor) -> Tensor | None:
    """Which places of a batch of token ids are no padding, bool of its shape; None if all are, and for pixels."""
    if batch.is_floating_point() or batch.is_complex() or not batch.numel() or int(batch.min()) >= 0:
        return None
    return batch != PADDING


def main_output(out: Any) -> Tensor:
    """The logits in a model's output, else its last hidden state, else its first tensor; ModhifiError without one.

    A single number for each item becomes ``(batch, 1)``.
    """
    for name in ("logits", "last_hidden_state"):
        value = out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
        if isinstance(value, Tensor):
            return value
    while isinstance(out, (tuple, list, Mapping)) and out:
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    if not isinstance(out, Tensor):
        raise ModhifiError(f"the model returns {type(out).__name__}, not a tensor; wrap it to return one")
    if out.ndim == 0:
        raise ModhifiError("the model returns one number for a whole batch; wrap it to return an output for each item")
    return out[:, None] if out.ndim == 1 else out


def load_model(
    spec: str | Path | nn.Module,
    *,
    pretrained: bool = True,
    model_args: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    example: Tensor | None = None,
    gguf_file: str | None = None,
) -> LoadedModel:
    """Load ``timm:NAME``, ``hf:ORG/NAME[@REVISION]``, a local directory (timm, transformers or modhifi) or a module.

    ``demo:resnet`` is the model that comes with the package.
    ``pretrained=False`` gives random weights from a fixed seed. ``model_args`` reach ``timm.create_model``, and
    ``weights`` is a ``.safetensors`` or ``.pth`` file for ``timm:NAME``. ``gguf_file`` names a GGUF file of the model,
    which is dequantised. ``example`` (batch first) replaces the random example and is required for a module that is
    neither timm's nor transformers'. A module is copied: the caller's own stays as it is.

    Raises ModhifiError, one line, for a name nobody knows, a model that cannot be had, one that is already quantised
    and one with NaN or infinite weights.
    """
    name, args = "" if isinstance(spec, nn.Module) else str(spec), dict(model_args or {})
    if weights is not None and not name.startswith("timm:"):
        raise ModhifiError("a weight file does not say its architecture; give timm:NAME with weights=FILE")
    if revision and not name.startswith(("timm:", "hf:")):
        raise ModhifiError("a revision pins a model of the hub; give it with hf:ORG/NAME or timm:NAME")
    if gguf_file and (not name or name.startswith("timm:")):
        raise ModhifiError("a GGUF file holds a language model; give it with hf:ORG/NAME or a directory")

    if isinstance(spec, nn.Module):
        loaded = _from_module(spec, args, example)
    elif name.startswith("timm:"):
        from modhifi import load_timm

        loaded = load_timm.from_name(name.removeprefix("timm:"), pretrained, args, weights, revision)
    elif name.startswith("hf:"):
        repo, revision = hub.split_revision(name.removeprefix("hf:"), revision)
        directory = hub.fetch_description(repo, revision, code=trust_remote_code)
        refuse_quantised_config(directory, f"hf:{repo}")
        if gguf_file or (pretrained and any((directory / f).is_file() for f in DESCRIPTIONS)):
            hub.fetch_weights(repo, directory.name, gguf_file)
        loaded = _from_directory(directory, f"hf:{repo}", pretrained, args, trust_remote_code, gguf_file)
        loaded = replace(loaded, info=loaded.info | {"repository": repo, "revision": directory.name})
    elif name.startswith("demo:"):
        loaded = _from_directory(bundled(name, MODELS), name, pretrained, args, trust_remote_code, gguf_file)
    else:
        directory = Path(name).expanduser()
        if directory.suffix == ".gguf" and directory.is_file():
            directory, gguf_file = directory.parent, directory.name
        _require_directory(directory)
        loaded = _from_directory(directory, name, pretrained, args, trust_remote_code, gguf_file)
    check_weights(loaded.model, loaded.source)
    return loaded if example is None else replace(loaded, example=example)


def check_weights(model: nn.Module, source: str) -> None:
    """Raise ModhifiError if the model is quantised or holds NaN or infinite values, naming the first such tensor.

    Buffers may hold minus infinity, as attention masks do. Tensors on the meta device have no values to look at.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantized", "bitsandbytes")) or hasattr(
            module, "qweight"
        ):
            _refuse_quantised(source, f"module {name!r} is a {type(module).__name__}")
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for name, tensor in parameters.items():
        if tensor.dtype not in FLOATS or type(tensor.data).__module__.startswith("torchao"):
            _refuse_quantised(source, f"parameter {name!r} is {tensor.dtype}")
    for name, tensor in (parameters | dict(model.named_buffers())).items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        masked = tensor.isneginf() if name not in parameters else False
        if not bool((tensor.isfinite() | masked).all()):
            raise ModhifiError(f"{source}: tensor {name!r} holds NaN or infinite values; repair the checkpoint")


def refuse_quantised_config(directory: Path, source: str) -> None:
    """Raise ModhifiError if the directory's ``config.json`` says that the weights are quantised."""
    config = read_config(directory)
    for part in (config, config.get("text_config") or {}):
        if quantised := part.get("quantization_config") or part.get("compression_config"):
            bits = quantised.get("bits") or ("4" if quantised.get("load_in_4bit") else None)
            method = quantised.get("quant_method", "an unnamed method")
            _refuse_quantised(source, f"quantization_config: {method}{f', {bits}-bit' if bits else ''}")


def refuse_quantised_files(directory: Path, source: str) -> None:
    """Raise ModhifiError if a safetensors file holds weights in integers or 8-bit floats.

    Copied into float parameters they would load without complaint, and without their scales.
    """
    for path in sorted(directory.glob("*.safetensors")):
        with hub.explained(source), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no dictionary
                kind = file.get_slice(name).get_dtype()
                if name.endswith("weight") and kind not in ("F64", "F32", "F16", "BF16"):
                    _refuse_quantised(source, f"tensor {name!r} of {path.name} is {kind}")


def read_config(directory: Path) -> dict[str, Any]:
    """The content of ``config.json``, empty if there is none; ModhifiError if it is not a JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModhifiError(f"{path} is not JSON ({error}); restore the file") from error
    if not isinstance(config, dict):
        raise ModhifiError(f"{path} is not a JSON object; restore the file")
    return config


def frozen(model: nn.Module) -> nn.Module:
    """The same model in eval mode, its parameters requiring no gradient."""
    return model.eval().requires_grad_(False)


def random_pixels(size: tuple[int, ...]) -> Tensor:
    """A seeded batch of 2 images of normal noise, float32 ``(2, C, H, W)``, as normalised pixels are."""
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def _refuse_quantised(source: str, why: str) -> NoReturn:
    raise ModhifiError(f"{source} is already quantised ({why}); prune the full-precision model, then quantise")


def _from_directory(
    directory: Path, source: str, pretrained: bool, args: dict[str, Any], trust_remote_code: bool, gguf_file: str | None
) -> LoadedModel:
    if (directory / "modhifi.json").is_file():
        from modhifi.artifact import load_artifact

        loaded: LoadedModel = load_artifact(directory)
        return loaded
    config = read_config(directory)
    refuse_quantised_config(directory, source)
    if pretrained and not gguf_file:
        refuse_quantised_files(directory, source)
    if "architecture" in config and not gguf_file:
        from modhifi import load_timm

        loaded = load_timm.from_directory(directory, source, pretrained, args)
    elif "model_type" in config or gguf_file:
        from modhifi import load_transformers

        if args:
            raise ModhifiError(f"model arguments are for timm's models; {source} takes its shape from its config.json")
        loaded = load_transformers.from_directory(directory, source, pretrained, trust_remote_code, gguf_file)
    else:
        raise ModhifiError(
            f"{source} is not a model that can be loaded: it needs a config.json in timm's or transformers' format "
            "or a modhifi.json"
        )
    return loaded


def _from_module(module: nn.Module, args: dict[str, Any], example: Tensor | None) -> LoadedModel:
    if args:
        raise ModhifiError("model arguments build a model from a name; a module is already built")
    source = f"module:{type(module).__name__}"
    check_weights(module, source)  # before the copy, which some quantised modules do not survive
    with hub.explained(source):
        model = frozen(own_copy(module))
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        from modhifi import load_timm

        return load_timm.describe(model, source)
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        from modhifi import load_transformers

        return load_transformers.describe(model, source, None)
    if not isinstance(example, Tensor):
        raise ModhifiError(f"{source}: pass example=, a batch of inputs (axis 0 the batch), with a plain module")
    info = {"architecture": type(module).__name__, "libraries": {"torch": torch.__version__}, "notes": []}
    return LoadedModel(model, source, "torch", "tensor", example, None, None, None, info)


def _require_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    if directory.is_file():
        raise ModhifiError(f"{directory} is a file and does not say its architecture; give timm:NAME with weights=FILE")
    import timm

    hint = "give timm:NAME, hf:ORG/NAME or a directory"
    if timm.is_model(directory.name.split(".")[0]):
        hint = f"is timm:{directory.name} meant?"
    elif str(directory).count("/") == 1 and not directory.is_absolute():
        hint = f"is hf:{directory} meant?"
    elif close := difflib.get_close_matches(str(directory), timm.list_models(), n=1, cutoff=0.8):
        hint = f"is timm:{close[0]} meant?"
    raise ModhifiError(f"there is no directory {directory}; {hint}")
