"""Loading transformers' models from a directory (local, or a snapshot of the hub) or already built."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn
from transformers import modeling_gguf_pytorch_utils
from transformers.models.auto import modeling_auto as auto
from transformers.utils import logging

from modhifi.errors import ModhifiError
from modhifi.models import hub
from modhifi.models.given import SOUNDS, main_input
from modhifi.models.listening import Listener, listener_of
from modhifi.models.loaded import LoadedModel, frozen, random_pixels
from modhifi.models.other_inputs import alternatives, completed, drawn, fed
from modhifi.models.parts import (
    SHIFTING,
    Part,
    drawn_tokens,
    parts_of,
    reads_both,
    require_parts,
    vocabulary_of,
)
from modhifi.models.preprocess import Preprocess
from modhifi.models.standardised import with_plain_weights

HEADS: tuple[tuple[str, Any, str], ...] = (
    ("AutoModelForImageClassification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "image"),
    ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "text"),
    ("AutoModelForSequenceClassification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "encoder"),
    ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "encoder"),
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
)


def from_directory(
    directory: Path, source: str, pretrained: bool, trust_remote_code: bool, gguf_file: str | None
) -> LoadedModel:
    """Loads the model of a directory as the class that its configuration's ``architectures`` name.

    Weights keep the checkpoint's dtype; a GGUF file is dequantised to float32. Raises ModhifiError if transformers
    cannot load it, if none of its backbone's weights are there, or if it would have to run code that is not trusted.
    """
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file:
        common["gguf_file"] = gguf_file
    loading_info: dict[str, Any] = {}
    with hub.explained(source), _bars_on_terminals_only(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(str(directory), **common)
        # A GGUF file holds a causal language model and names no architecture of transformers.
        if pretrained:
            builder = getattr(transformers, "AutoModelForCausalLM" if gguf_file else class_name(config))
            known = {"config": config} if gguf_file else {}  # which would be parsed again, token by token
            model, loading_info = builder.from_pretrained(
                str(directory), dtype="auto", output_loading_info=True, **known, **common
            )
        else:
            model = build(config, trust_remote_code)
    if gguf_file:
        model = _without_quantiser(model)
    loaded = loaded_from(frozen(model), source, directory, **common)
    loaded.info["licence"] = hub.card_licence(directory / "README.md")
    if gguf_file and pretrained:
        megabytes = (directory / gguf_file).stat().st_size / 1e6
        loaded.info["warnings"].append(
            f"{gguf_file} ({megabytes:,.4g} MB) is dequantised to float32: what is written is larger than that file "
            "until it is converted and quantised again"
        )
    if missing := sorted(loading_info.get("missing_keys", ())):
        _refuse_foreign(model, set(missing), source)
        loaded.info["notes"].append(f"not in the checkpoint, newly initialised: {', '.join(missing)}")
    if unused := sorted(loading_info.get("unexpected_keys", ())):
        loaded.info["warnings"].append(
            f"{len(unused)} tensors of the checkpoint are not used by {type(model).__name__}, such as '{unused[0]}'"
        )
    return loaded


def _refuse_foreign(model: Any, missing: set[str], source: str) -> None:
    """Raise ModhifiError where the checkpoint has no tensor of the model's backbone: it would stay random."""
    prefix = model.base_model_prefix if model.base_model is not model else ""
    backbone = [name for name in model.state_dict() if name.startswith(f"{prefix}." if prefix else "")]
    if missing.issuperset(backbone):
        raise ModhifiError(
            f"{source} holds no weights of its {type(model).__name__}: {len(missing)} tensors are missing, such as "
            f"'{backbone[0]}'; give the weights that belong to its config.json, or ask for random weights"
        )


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keeps transformers' own progress bars out of logs and pipes."""
    were_enabled, of_gguf = logging.is_progress_bar_enabled(), modeling_gguf_pytorch_utils.tqdm
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        # It asks no one.
        modeling_gguf_pytorch_utils.tqdm = partial(of_gguf, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = of_gguf
        if were_enabled:
            logging.enable_progress_bar()


def class_name(config: Any) -> str:
    """The name of the class of transformers that keeps the head of the first architecture a configuration names.

    An Auto class where one builds that architecture, otherwise the architecture's own class, and ``AutoModel`` for one
    that transformers does not have.
    """
    for architecture in config.architectures or ():
        for name, mapping, _ in HEADS:
            known = {c for value in mapping.values() for c in ([value] if isinstance(value, str) else value)}
            if architecture in known or str((getattr(config, "auto_map", None) or {}).get(name, "")).endswith(
                f".{architecture}"
            ):
                return name
        named = getattr(transformers, str(architecture), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            if named.config_class is not None and isinstance(config, named.config_class):
                bare = auto.MODEL_MAPPING_NAMES.get(config.model_type)
                return "AutoModel" if architecture == bare else str(architecture)
    return "AutoModel"


def build(config: Any, trust_remote_code: bool = False) -> Any:
    """Builds the model that a configuration describes, with random weights, as the class of :func:`class_name`."""
    builder = getattr(transformers, class_name(config))
    if issubclass(builder, transformers.PreTrainedModel):
        return builder._from_config(config)  # what the Auto classes call, too
    return builder.from_config(config, trust_remote_code=trust_remote_code)


def attending_by_default(model: Any) -> list[str]:
    """Has a model compute its attention as transformers does where nobody asks, in place; a sentence if it did not.

    What another kernel gives differs by rounding, some need a GPU, and no file says which one it was.
    """
    known, default = getattr(model.config, "_attn_implementation", None), None
    if known is not None and isinstance(model, transformers.PreTrainedModel):
        default = model.get_correct_attn_implementation(None)
    if default in (None, known):
        return []
    with hub.explained(type(model).__name__):
        model.set_attn_implementation(default)
    return [f"attention was {known} and is {default}, as transformers loads it: set_attn_implementation({known!r})"]


def loaded_from(model: Any, source: str, directory: Path | None, **common: Any) -> LoadedModel:
    """Completes a built transformers model with its preprocessing or tokenizer, an example, labels and a description.

    Preprocessing and tokenizer are read from ``directory``; with None, a processor usual for the family and no
    tokenizer. Raises ModhifiError if the model reads nothing that is known (:mod:`modhifi.models.parts`).
    """
    model = with_plain_weights(model)
    config, notes, warnings = model.config, list[str](), list[str]()
    transform = tokenizer = labels = listener = packing = None
    parts: tuple[Part, ...] = ()
    kind = _kind(model, config)
    if kind == "image":
        transform = _image_transform(config, directory, notes, common.get("trust_remote_code", False))
        example = random_pixels(tuple(transform(Image.new("RGB", (320, 320))).shape))
    elif kind in ("text", "encoder"):
        chance = torch.Generator().manual_seed(0)
        example = torch.randint(vocabulary_of(config), (2, 16), generator=chance)
        tokenizer = _tokenizer(directory, notes, **{"trust_remote_code": False, **common})
    else:
        transform, tokenizer, listener, pixels = _preparations(model, directory, notes, common)
        parts = parts_of(model, pixels, listener, warnings)
        if not parts and main_input(model) == "input_ids":
            kind, transform = "text" if model.can_generate() else "encoder", None
            chance = torch.Generator().manual_seed(0)
            example = torch.stack([drawn_tokens(config, 16, chance) for _ in range(2)])
        else:
            forms = [parts] if parts else list(alternatives(model, (), pixels, listener))
            parts, batch = next(drawn(model, forms), ((), {}))
            require_parts(parts, source, main_input(model))
            kind, packing, example = fed(parts, batch)
    architecture = (config.architectures or [type(model).__name__])[0]
    if architecture != type(model).__name__:
        warnings.append(f"loaded as {type(model).__name__}: the head of {architecture} is left out")
    if type(model).__name__.endswith("Classification"):
        names = [str((config.id2label or {}).get(i, i)) for i in range(config.num_labels)]
        labels = None if all(n == f"LABEL_{i}" for i, n in enumerate(names)) else tuple(names)
    info = {
        "architecture": type(model).__name__,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": config.to_dict(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokenizer_class": tokenizer and type(tokenizer).__name__,
        "processor_class": transform and transform.processor and type(transform.processor).__name__,
        "revision": None,
        "licence": None,
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
        "notes": notes,
        "warnings": warnings,
    }
    info = json.loads(json.dumps(info, default=str))
    loaded = LoadedModel(
        model,
        source,
        "transformers",
        kind,
        example,
        transform,
        tokenizer,
        labels,
        info,
        packing=packing,
        parts=parts,
        listener=listener,
    )
    return completed(loaded)


def _preparations(
    model: Any, directory: Path | None, notes: list[str], common: dict[str, Any]
) -> tuple[Preprocess | None, Any | None, Listener | None, tuple[int, ...] | None]:
    """What prepares the images, the text and the sound that a model reads, and the shape of a prepared image."""
    transform = tokenizer = listener = pixels = None
    takes = inspect.signature(model.forward).parameters
    if main_input(model) == "pixel_values" or reads_both(model):
        transform = _image_transform(model.config, directory, notes, common.get("trust_remote_code", False))
        pixels = tuple(transform(Image.new("RGB", (320, 320))).shape)
        if "pixel_attention_mask" in takes and len(pixels) == 3:
            pixels = (1, *pixels)  # several images an item
    if {"input_ids", "decoder_input_ids"} & set(takes):
        tokenizer = _tokenizer(directory, notes, **{"trust_remote_code": False, **common})
    if main_input(model) in SOUNDS:
        listener = listener_of(model, directory, notes)
    return transform, tokenizer, listener, pixels


def _kind(model: Any, config: Any) -> str | None:
    """``image``, ``text`` or ``encoder`` for a model that reads pixels or token ids alone."""
    takes = inspect.signature(model.forward).parameters
    shifting = type(model).__name__.endswith(SHIFTING)
    if reads_both(model) or (config.is_encoder_decoder and "decoder_input_ids" in takes and not shifting):
        return None
    if main_input(model) == "pixel_values":
        return "image"
    if main_input(model) != "input_ids":
        return None
    causal = {c for value in HEADS[1][1].values() for c in ([value] if isinstance(value, str) else value)}
    mapped = str((getattr(config, "auto_map", None) or {}).get(HEADS[1][0], "")).endswith(f".{type(model).__name__}")
    return "text" if type(model).__name__ in causal or mapped or model.can_generate() else "encoder"


def _image_transform(config: Any, directory: Path | None, notes: list[str], trusted: bool) -> Preprocess:
    # Seconds of imports that language models do without.
    from timm.data import create_transform
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
    if directory is not None and (directory / "preprocessor_config.json").is_file():
        with hub.explained(str(directory / "preprocessor_config.json")):
            processor = transformers.AutoImageProcessor.from_pretrained(str(directory), trust_remote_code=trusted)
        return Preprocess(partial(_process, processor), mode, processor)
    parts = (config, getattr(config, "vision_config", None), getattr(config, "encoder", None))
    size = next((size for part in parts if (size := getattr(part, "image_size", None))), 224)
    size = (size, size) if isinstance(size, int) else tuple(size)
    family = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type)
    names = list(family.values()) if isinstance(family, dict) else []
    default = getattr(transformers, names[0], None) if names else None
    mean, std = getattr(default, "image_mean", None), getattr(default, "image_std", None)
    if mean is None or std is None:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if mode == "L":
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    notes.append(
        f"no preprocessor_config.json: images are resized to {size[0]} x {size[1]} and normalised with the mean "
        f"{tuple(mean)} and standard deviation {tuple(std)} usual for {config.model_type}, which may not be the model's"
    )
    channels = 1 if mode == "L" else 3
    pipeline = create_transform((channels, *size), is_training=False, mean=tuple(mean), std=tuple(std), crop_pct=1.0)
    return Preprocess(pipeline, mode)


def _process(processor: Any, image: Image.Image) -> Tensor:
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels.float()


def _tokenizer(directory: Path | None, notes: list[str], **common: Any) -> Any | None:
    # Without its files transformers builds an empty tokenizer of the family, which maps every text to nothing.
    if directory is None or not ("gguf_file" in common or any((directory / f).is_file() for f in TOKENIZER_FILES)):
        notes.append("no tokenizer files")
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(directory), **common)
    except Exception as error:  # a model can be measured on token ids without it
        notes.append(f"no tokenizer: {hub.first_line(error)}")
        return None


def _without_quantiser(model: Any) -> nn.Module:
    """The same weights in a fresh model: one that came from GGUF refuses to be saved."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():  # random weights would be drawn for nothing
        plain: Any = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return cast(nn.Module, plain)
