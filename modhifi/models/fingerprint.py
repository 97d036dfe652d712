"""What a loaded model is and does, as one hash: what was computed with another one does not belong to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from modhifi.cache import tensors_hash
from modhifi.models.hooks import attached, on_input
from modhifi.models.loaded import LoadedModel
from modhifi.models.trial import buffers_restored
from modhifi.models.weights import state_hash
from modhifi.progress import PACKAGES, version_of


@torch.no_grad()
def fingerprint(loaded: LoadedModel, watched: Mapping[str, nn.Module]) -> str:
    """SHA-256 over weights, modules, configuration, versions and one forward pass on the model's own example.

    Of the pass, the inputs of the ``watched`` modules and the main output count: the same weights behind another
    ``forward`` are another model.
    """
    seen: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        seen[f"{len(seen)} {name}"] = x.detach().clone()

    handles = (on_input(module, partial(see, name)) for name, module in watched.items())
    with buffers_restored(loaded.model), attached(handles):
        seen["output"] = loaded.logits(loaded.example)
    parts = {
        "weights": state_hash(loaded.model),
        "code": repr(loaded.model) + str(getattr(loaded.model, "config", "")),
        "pass": tensors_hash(seen),
        "device": next(loaded.model.parameters()).device.type,
        "versions": [version_of(name) for name in PACKAGES],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
