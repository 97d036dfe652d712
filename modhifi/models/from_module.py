"""Models that a Python program holds itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.models import hub
from modhifi.models.loaded import LoadedModel, frozen
from modhifi.models.offload import own_copy
from modhifi.models.weights import check_weights


def from_module(module: nn.Module, args: dict[str, Any], example: Tensor | None) -> LoadedModel:
    """Copies a module to the CPU and completes it to a model that can be measured and edited.

    A module of timm or transformers brings its own example; any other needs ``example``, a batch of inputs (axis 0 the
    batch). Raises ModhifiError without one, for a quantised module and for ``args``, which build a model from a name.
    """
    if args:
        raise ModhifiError("model arguments build a model from a name; a module is already built")
    source = f"module:{type(module).__name__}"
    check_weights(module, source)  # before the copy, which some quantised modules do not survive
    with hub.explained(source):
        model = frozen(own_copy(module))
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        from modhifi.models import from_timm

        return from_timm.loaded_from(model, source)
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        from modhifi.models import from_transformers

        return from_transformers.loaded_from(model, source, None)
    if not isinstance(example, Tensor):
        raise ModhifiError(f"{source}: pass example=, a batch of inputs (axis 0 the batch), with a plain module")
    info = {"architecture": type(module).__name__, "libraries": {"torch": torch.__version__}, "notes": []}
    return LoadedModel(model, source, "torch", "tensor", example, None, None, None, info)
