"""A model ready to be measured and edited, with what is needed to feed it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.models.manifest import Artifact
from modhifi.structure.outputs import named_tensors

# Marks the places of a batch of token ids behind the end of a shorter text; in any other integers -1 is a value.
PADDING = -1


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured and edited, with what is needed to feed it.

    ``model`` is on the CPU, in eval mode, and none of its parameters requires a gradient. ``source`` is what was asked
    for (``timm:NAME``, ``hf:ORG/NAME``, a directory, ``module:CLASS``), ``framework`` timm, transformers or torch.
    ``kind`` is image (classifier or backbone), text (causal language model), encoder (other token models) or tensor
    (any module with a given example). ``example`` is a seeded batch of 2 model-ready inputs: normalised pixels
    ``(2, C, H, W)`` or token ids ``(2, 16)``. ``transform`` is the model's own evaluation preprocessing, PIL image to
    float32 ``(C, H, W)``. ``info`` is JSON-able: architecture, arguments, resolved commit, licence, versions, notes.
    ``artifact`` is what an artefact of ours says of the model, its manifest above all.
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
    artifact: Artifact | None = None

    def logits(self, batch: Tensor, model: nn.Module | None = None) -> Tensor:
        """The main output of one forward pass of ``model`` (default: this model) on a batch, axis 0 the batch.

        Logits where the model has them, otherwise its last hidden state or first output. The batch moves to the
        model's device, and pixels to its dtype; token ids of ``PADDING`` are masked out of the attention. Raises
        ModhifiError if the model returns no tensor.
        """
        return main_output(self._forward(batch, model))

    def outputs(self, batch: Tensor, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Every tensor that one forward pass returns, by its place in the output; "" where there is one alone.

        The batch is treated, and errors are raised, as in :meth:`logits`.
        """
        output = self._forward(batch, model)
        main_output(output)
        return dict(named_tensors(output))

    def run(self, batch: Tensor, model: nn.Module | None = None) -> None:
        """A pass of which only the inner activations are wanted: language models that can leave out their logits."""
        model = self.model if model is None else model
        spare = self.kind == "text" and "logits_to_keep" in inspect.signature(model.forward).parameters
        self._forward(batch, model, **({"logits_to_keep": 1} if spare else {}))

    @property
    def reads_tokens(self) -> bool:
        """Whether its inputs are token ids, of texts that are padded to one length."""
        return self.kind in ("text", "encoder")

    def real_tokens(self, batch: Tensor) -> Tensor | None:
        """Which places of a batch are no padding, bool of its shape; None if all are, and of a model without tokens."""
        return real_tokens(batch) if self.reads_tokens else None

    def _forward(self, batch: Tensor, model: nn.Module | None, **more: Any) -> Any:
        model = self.model if model is None else model
        first = next(model.parameters(), None)
        if first is not None:
            batch = batch.to(first.device, first.dtype if batch.is_floating_point() else None)
        if self.kind == "text":
            more["use_cache"] = False  # a key-value cache would hold memory that a single pass never reads
        if (real := self.real_tokens(batch)) is not None:
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
    """Which places of a batch of token ids are no padding, bool of its shape; None if all are."""
    return None if not batch.numel() or int(batch.min()) >= 0 else batch != PADDING


def main_output(out: Any) -> Tensor:
    """The logits in a model's output, else its last hidden state, else its first tensor; ModhifiError without one.

    A single number for each item becomes ``(batch, 1)``.
    """
    for name in ("logits", "last_hidden_state"):
        value = out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
        if isinstance(value, Tensor):
            return value
    first = next((tensor for _, tensor in named_tensors(out)), None)
    if first is None:
        raise ModhifiError(f"the model returns {type(out).__name__}, not a tensor; wrap it to return one")
    if first.ndim == 0:
        raise ModhifiError("the model returns one number for a whole batch; wrap it to return an output for each item")
    return first[:, None] if first.ndim == 1 else first


def frozen(model: nn.Module) -> nn.Module:
    """The same model in eval mode, its parameters requiring no gradient."""
    return model.eval().requires_grad_(False)


def random_pixels(size: tuple[int, ...]) -> Tensor:
    """A seeded batch of 2 images of normal noise, float32 ``(2, C, H, W)``, as normalised pixels are."""
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
