"""Calibration text that a masked language model writes itself: Gibbs-like, by resampling masked tokens.

Wang and Cho, "BERT has a mouth, and it must speak" (2019). A window begins as the tokenizer's own frame around nothing
but masks; in every sweep all its places are masked and drawn anew, a share at a time, given what stands around them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from modhifi.data.text import cutter_of
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.models.trial import failure_told

# The share of a window that is masked at once, as these models are trained, and how often each place is drawn.
MASKED, SWEEPS = 0.15, 3
# Windows resampled side by side: few, as there are logits at every place.
BATCH = 4


class Resampler:
    """Writes windows of ``length`` tokens.

    Raises ModhifiError for models without a masked-LM head or a mask token.
    """

    name, how, pieces, batch = "resampled", "sampled at temperature 1", 1, BATCH

    def __init__(self, loaded: LoadedModel, length: int) -> None:
        name = type(loaded.model).__name__
        if name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
            raise ModhifiError(
                f"{loaded.source} ({name}) has no masked-language-model head to write text with; give "
                "--data text:FILE or hf:DATASET"
            )
        self.loaded, cutter = loaded, cutter_of(loaded, length)
        mask = cutter.tokenizer.mask_token_id
        if mask is None:
            raise ModhifiError(
                f"the tokenizer of {loaded.source} has no mask token to write text with; give --data "
                "text:FILE or hf:DATASET"
            )
        before, behind = cutter.frame
        self.mask, self.special = mask, [i for i in cutter.tokenizer.all_special_ids if i < cutter.vocabulary]
        self.empty = torch.tensor([*before, *[mask] * (length - len(before) - len(behind)), *behind])
        self.inner = torch.arange(len(before), length - len(behind))

    @property
    def what(self) -> str:
        return f"masks alone, {SWEEPS} sweeps of resampling, {MASKED:.0%} masked at once"

    def write(self, count: int, chance: torch.Generator) -> Tensor:
        """Windows, int64 ``(count, length)``; the draws are made on the CPU."""
        windows, rows = self.empty.repeat(count, 1), torch.arange(count)[:, None]
        for _ in range(SWEEPS):
            order = self.inner[torch.rand(count, len(self.inner), generator=chance).argsort(1)]
            for places in order.split(math.ceil(MASKED * len(self.inner)), 1):
                windows[rows, places] = self.mask
                with failure_told(self.loaded, windows):
                    outputs = self.loaded.logits(windows)
                logits = outputs.cpu()[rows, places].float()
                logits[..., self.special] = -math.inf
                drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=chance)
                windows[rows, places] = drawn.view_as(places)
        return windows

    def window(self, texts: list[Tensor]) -> Tensor:
        """A window, int64 ``(length,)``: the one text that it holds."""
        (text,) = texts
        return text
