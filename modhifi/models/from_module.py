"""Models that a Python program holds itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.models import hub
from modhifi.models.loaded import LoadedModel
from modhifi.models.packing import is_several
from modhifi.models.plain_copy import plain_copy, unwrapped, weight_norms
from modhifi.models.skeleton import build_skeleton, own_config, same_modules
from modhifi.models.weights import check_weights


def from_module(module: nn.Module, args: dict[str, Any], example: Any) -> LoadedModel:
    """Copies a module to the CPU and completes it to a model that can be measured and edited.

    A module of timm or transformers brings its own example; any other needs ``example``, a batch of inputs (axis 0 the
    batch) or a nest of several. Raises ModhifiError without one, for a quantised module and for ``args``, which build a
    model from a name.
    """
    if args:
        raise ModhifiError("model arguments build a model from a name; a module is already built")
    source = f"module:{type(unwrapped(module)[0]).__name__}"
    check_weights(module, source)  # before the copy, which some quantised modules do not survive
    with hub.explained(source):
        model, notes = plain_copy(module, source)
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        from modhifi.models import from_timm

        return _noting(from_timm.loaded_from(model, source), notes)
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        from modhifi.models import from_transformers

        notes += from_transformers.attending_by_default(model)
        loaded = _noting(from_transformers.loaded_from(model, source, None), notes)
        return replace(loaded, info=loaded.info | {"weight_norms": _library_norms(unwrapped(module)[0], loaded)})
    if not isinstance(example, Tensor) and not is_several(example):
        raise ModhifiError(f"{source}: pass example=, a batch of inputs (axis 0 the batch), with a plain module")
    info = {"architecture": type(model).__name__, "libraries": {"torch": torch.__version__}, "notes": notes}
    return LoadedModel(model, source, "torch", "tensor", torch.empty(0), None, None, None, info).with_example(example)


def _library_norms(module: nn.Module, loaded: LoadedModel) -> dict[str, tuple[str, int]]:
    """The weight norms of a module, if its library builds it with just these layers."""
    norms = weight_norms(module)
    try:
        stock = bool(norms) and build_skeleton(loaded.framework, loaded.info, own_config(module), values=False)
    except ModhifiError:  # code of one's own
        return {}
    return norms if stock and same_modules(stock, module) else {}


def _noting(loaded: LoadedModel, notes: list[str]) -> LoadedModel:
    return replace(loaded, info=loaded.info | {"notes": [*notes, *loaded.info["notes"]]})
