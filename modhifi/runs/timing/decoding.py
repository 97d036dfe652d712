"""One step of a causal language model that writes: a token behind a window whose keys and values are kept."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from modhifi.models.hub import explained
from modhifi.runs.timing.runtimes.base import Run


@torch.inference_mode()
def decoding(model: Any, batch: Tensor) -> Run:
    """Runs the last token of each text in ``batch`` ``(n, tokens)`` on a cache of all before it, each time the same.

    Raises ModhifiError for a model that keeps no such cache, or none that can be set back.
    """
    # newer versions of transformers give the argument another name
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with explained("a token behind a window"):
        cache = getattr(model(batch, use_cache=True), name)
        cache.crop(-1)

    @torch.inference_mode()
    def run() -> Tensor:
        logits: Tensor = model(batch[:, -1:], use_cache=True, **{name: cache}).logits
        cache.crop(-1)
        return logits

    return run
