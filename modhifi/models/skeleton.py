"""Rebuilding a pruned model: its dense architecture from a description, then its own shapes, then its weights.

The cut is recorded as the difference to the dense architecture: the shapes of tensors and the integers that
modules count with (``out_channels``, ``num_heads``, ...). A model cut twice differs from the same dense architecture,
so nothing has to be composed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.models.hub import explained
from modhifi.models.loaded import LoadedModel, frozen
from modhifi.models.manifest import Count, Differences
from modhifi.models.standardised import with_plain_weights
from modhifi.models.trust import PLACES
from modhifi.models.undrawn import Undrawn
from modhifi.structure.arguments import taking
from modhifi.structure.clone import clone
from modhifi.structure.depth import both_removed, drop, name_after
from modhifi.structure.head_counts import set_count

FIELD = "modhifi"


def without_code(config: Any) -> Any:
    """Removes from a configuration, in place, the entries of :func:`modhifi.artifacts.remote_code.add_code`."""
    if hasattr(config, FIELD):
        del config.auto_map
        delattr(config, FIELD)
    return config


def build_skeleton(
    framework: str, info: Mapping[str, Any], config: Any = None, *, values: bool = True, stock: bool = False
) -> nn.Module:
    """Builds the dense architecture that ``info`` describes, without its weights, by timm or transformers.

    Parameters are on the meta device. Where construction computes values that no weight file holds (non-persistent
    buffers, plain tensors) and ``values`` asks for them, the model is built on the CPU instead. ``config`` is the
    configuration of a transformers model. ``stock`` leaves the layers as the library has them, which standardise their
    weights. Raises ModhifiError if the library cannot build it.
    """
    model = _skeleton(framework, info, config, values)
    return frozen(model if stock else with_plain_weights(model))


def _skeleton(framework: str, info: Mapping[str, Any], config: Any, values: bool) -> nn.Module:
    with explained(f"the architecture {info.get('architecture')}"), torch.random.fork_rng(devices=[]), Undrawn():
        try:
            with torch.device("meta"):
                model = _construct(framework, info, config)
        except (NotImplementedError, RuntimeError):
            # Some constructors read values, which the meta device does not have.
            return _construct(framework, info, config)
        if values and _computes_values(model):
            model = _construct(framework, info, config)
    return model


def _construct(framework: str, info: Mapping[str, Any], config: Any) -> nn.Module:
    if framework == "timm":
        import timm
        from timm.models import PretrainedCfg

        name = str(info["architecture"])
        if not timm.is_model(name.partition(".")[0]):
            raise ModhifiError(f"timm has no architecture {name}")
        known = {field.name for field in dataclasses.fields(PretrainedCfg)} - PLACES
        described = {k: _tuples(v) for k, v in info["pretrained_cfg"].items() if k in known}
        args = {k: _tuples(v) for k, v in info["model_args"].items()}
        model: nn.Module = timm.create_model(name, pretrained_cfg=described, **args)
        return model
    if framework == "transformers":
        from modhifi.models.from_transformers import build

        model = build(config)
        return model
    raise ModhifiError("a module of your own has no factory to build it; pass skeleton=, the dense module")


def _tuples(value: Any) -> Any:
    """Turns JSON's lists into the tuples that timm's arguments are."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _computes_values(model: nn.Module) -> bool:
    plain = any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())
    return plain or bool(computed_buffers(model))


def computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that no weight file holds (non-persistent ones), by name."""
    stored = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in stored}


def same_shapes(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules have parameters and buffers of the same names and shapes."""
    first_state, second_state = first.state_dict(), second.state_dict()
    return {k: v.shape for k, v in first_state.items()} == {k: v.shape for k, v in second_state.items()}


def same_modules(skeleton: nn.Module, model: nn.Module) -> bool:
    """Whether two models have the same modules under the same names, whatever their shapes."""
    ours, theirs = ({n: _class(m) for n, m in whole.named_modules()} for whole in (skeleton, model))
    return ours == theirs


def _class(module: nn.Module) -> str:
    """The name of a module's class, in full: every graph of torch.fx has a class of its own."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def differences(skeleton: nn.Module, model: nn.Module) -> Differences:
    """The changes of ``skeleton`` after which it fits the weights of ``model``, JSON-able.

    ``shapes`` maps names of the state dict to their shape, None for a removed tensor; ``attributes`` maps module
    names to integer attributes; ``dtypes`` maps non-persistent buffers to their dtype. Both have the same modules.
    """
    before, after = skeleton.state_dict(), model.state_dict()
    shapes: dict[str, Any] = {
        name: list(tensor.shape)
        for name, tensor in after.items()
        if name not in before or before[name].shape != tensor.shape
    }
    shapes |= dict.fromkeys(before.keys() - after.keys())
    attributes = {}
    dense_modules = dict(skeleton.named_modules())
    own_config = getattr(model, "config", None)
    for name, module in model.named_modules():
        dense_counts = vars(dense_modules[name])
        changed = {
            k: v for k, v in vars(module).items() if _counts(v) and (k not in dense_counts or dense_counts[k] != v)
        }
        config = getattr(module, "config", None)
        if "config" in dense_counts and module is not model and hasattr(config, "to_dict") and config is not own_config:
            # A copy made for this layer alone.
            layer_config, dense_config = vars(config), vars(dense_counts["config"])
            changed |= {
                f"config.{k}": v for k, v in layer_config.items() if type(v) is int and dense_config.get(k) != v
            }
        if changed:
            attributes[name] = changed
    computed = computed_buffers(skeleton)
    dtypes = {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in computed_buffers(model).items()
        if name in computed and computed[name].dtype != buffer.dtype
    }
    return {"shapes": shapes, "attributes": attributes, "dtypes": dtypes, "removed": {}}


def _counts(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_counts(v) for v in value)
    return isinstance(value, int) and not isinstance(value, bool)


def reshape(model: nn.Module, changes: Differences) -> nn.Module:
    """Applies :func:`differences` in place: modules go, tensors become empty ones of their shapes, counts are set."""
    with explained("the skeleton"):
        drop(model, changes["removed"])
        for name, shape in changes["shapes"].items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            empty = None if shape is None else torch.empty(shape, device="meta")
            if leaf in module._buffers:
                module._buffers[leaf] = empty
            else:
                module._parameters[leaf] = None if empty is None else nn.Parameter(empty, requires_grad=False)
        for name, values in changes["attributes"].items():
            for attribute, value in values.items():
                _recount(model.get_submodule(name), attribute, value)
        for name, dtype in changes["dtypes"].items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            module._buffers[leaf] = getattr(module, leaf).to(getattr(torch, dtype))
    return taking(model)


def _recount(module: nn.Module, attribute: str, value: Count) -> None:
    """Sets a counting attribute; raises ModhifiError for one that holds anything but counts."""
    owner, _, leaf = attribute.rpartition(".")
    if owner == "config":  # one with fields of each layer refuses to tell, by getattr, those of all
        before = vars(module.config).get(leaf, getattr(type(module.config), leaf, None))
    else:
        before = getattr(module, leaf, None)
    if owner not in ("", "config") or not (before is None or _counts(before)):
        raise ModhifiError(f"the attribute {attribute} of a {type(module).__name__} counts nothing; restore the file")
    set_count(module, attribute, _tuples(value))


def fill(model: nn.Module, state: dict[str, Tensor], tied: dict[str, str], source: str) -> nn.Module:
    """Assigns a model its weights, in place, and ties shared ones again; raises ModhifiError if they do not fit.

    ``tied`` maps each further name of a shared tensor to the name in ``state``.
    """
    with explained(source):
        model.load_state_dict(state | {name: state[first] for name, first in tied.items()}, assign=True)
        for name, first in tied.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _tensor(model, first))
    return frozen(model)


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(owner), leaf)
    return value


def record(
    original: LoadedModel, edited: nn.Module, removed: Mapping[str, int] = MappingProxyType({})
) -> tuple[str, Differences]:
    """The framework that can rebuild ``edited``, and its differences to the dense architecture.

    ``removed`` are the blocks and sublayers of ``original`` that it lacks, as `structure.depth.removed_parts` gives
    them. A model that its library would build otherwise (one changed by hand) is recorded as ``torch``: loading it
    needs the dense module. Raises ModhifiError where it has other modules than ``original`` without those.
    """
    nothing: Differences = {"shapes": {}, "attributes": {}, "dtypes": {}, "removed": {}}
    earlier = nothing if original.artifact is None else original.artifact.manifest.model.differences
    gone = both_removed(earlier["removed"], removed)
    if original.framework != "torch":
        blocks = {name: outputs for name, outputs in gone.items() if not outputs}
        sublayers = {str(name_after(name, blocks)): outputs for name, outputs in gone.items() if outputs}
        for unstated in (sublayers, gone):  # where the configuration says which blocks are gone, and where it does not
            try:
                skeleton = build_skeleton(original.framework, original.info, own_config(edited), values=False)
                skeleton = drop(skeleton, unstated)
            except (ModhifiError, AttributeError):
                continue  # the library cannot build it alone, remote code for instance, or builds it without these
            if same_modules(skeleton, edited):
                found: Differences = {**differences(skeleton, edited), "removed": dict(unstated)}
                if not original.is_module or _is_rebuilt(edited, original, found):
                    return original.framework, found
    dense = drop(clone(original.model, original.model.parameters()), removed) if removed else original.model
    if not same_modules(dense, edited):
        raise ModhifiError("the edited model has other modules than the one it was made from; it cannot be saved")
    changes = differences(dense, edited)
    return "torch", {
        "shapes": _still_there(earlier["shapes"], removed) | changes["shapes"],
        "attributes": _merge(_still_there(earlier["attributes"], removed), changes["attributes"]),
        "dtypes": _still_there(earlier["dtypes"], removed) | changes["dtypes"],
        "removed": dict(gone),
    }


def _is_rebuilt(edited: nn.Module, original: LoadedModel, changes: Differences) -> bool:
    """Whether the library's architecture with the weights of ``edited`` is the same function, to the bit.

    That of a module may have been changed by hand, in numbers that are neither widths nor weights.
    """
    skeleton = build_skeleton(original.framework, original.info, own_config(edited))
    rebuilt = fill(reshape(skeleton, changes), edited.state_dict(), {}, original.source)
    return _same_outputs(edited, original, rebuilt)


def _still_there(entries: Mapping[str, Any], removed: Mapping[str, int]) -> dict[str, Any]:
    """The entries of modules and tensors that are not removed, by their names afterwards."""
    return {after: value for name, value in entries.items() if (after := name_after(name, removed)) is not None}


def _merge(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: old.get(name, {}) | new.get(name, {}) for name in old | new}


def is_stock(edited: nn.Module, original: LoadedModel, config: Any, changes: Differences) -> bool:
    """Whether the configuration alone describes the edited model.

    That is so where a model built from it, with the edited weights, is the same function.
    """
    if changes["shapes"] or changes["dtypes"] or changes["removed"]:
        return False
    if not same_modules(build_skeleton(original.framework, original.info, config, values=False, stock=True), edited):
        return False
    if not changes["attributes"]:
        return True
    # Counts that no forward pass reads may differ, a layer's record of its former width for instance.
    return same_function(edited, original, config)


def same_function(edited: nn.Module, original: LoadedModel, config: Any) -> bool:
    """Whether the model of a configuration, given the weights of ``edited``, has its outputs, to the bit."""
    stock = build_skeleton(original.framework, original.info, config, stock=True)
    if not same_modules(stock, edited):
        return False
    return _same_outputs(edited, original, fill(stock, edited.state_dict(), {}, original.source))


def _same_outputs(edited: nn.Module, original: LoadedModel, rebuilt: nn.Module) -> bool:
    """Whether a model built anew has the outputs of ``edited`` on the example, to the bit; it may fail instead."""
    rebuilt.to(next(edited.parameters()).device)
    with torch.inference_mode():
        expected = original.outputs(original.example, edited)
        try:
            outputs = original.outputs(original.example, rebuilt)
        except Exception:  # its code counts on something that its shapes do not show
            return False
    return outputs.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in outputs.items())


def own_config(model: Any) -> Any:
    """A copy of a transformers model's configuration that names its class; None for other models."""
    config = copy.deepcopy(getattr(model, "config", None))
    if config is not None:
        config.architectures = [type(model).__name__]
    return config


def read_config(directory: Path) -> Any:
    """Reads the transformers configuration in an artefact; raises ModhifiError where transformers cannot."""
    import transformers

    with explained(str(directory)):
        return without_code(transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=False))
