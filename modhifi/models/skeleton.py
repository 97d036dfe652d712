"""Rebuild a model that was cut: its dense architecture from a description, then its own shapes, then its weights.

What was cut is recorded as the difference to the dense architecture: the shapes of tensors and the integers that
modules count with (``out_channels``, ``num_heads``, ...). A model cut twice differs from the same dense architecture,
so nothing has to be composed.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.models.hub import explained
from modhifi.models.loaded import LoadedModel, frozen
from modhifi.structure.head_counts import set_count

FIELD = "modhifi"


def without_code(config: Any) -> Any:
    """The configuration of the family's own class, in place: what :func:`add_code` named is taken out."""
    if hasattr(config, FIELD):
        del config.auto_map
        delattr(config, FIELD)
    return config


Differences = dict[str, dict[str, Any]]


def build_skeleton(framework: str, info: dict[str, Any], config: Any = None, *, values: bool = True) -> nn.Module:
    """The dense architecture that ``info`` describes, without its weights, as timm or transformers build it.

    Parameters are on the meta device. Where construction computes values that no weight file holds (non-persistent
    buffers, plain tensors) and ``values`` asks for them, the model is built on the CPU instead. ``config`` is the
    configuration of a transformers model. Raises ModhifiError if the library cannot build it.
    """
    with explained(f"the architecture {info.get('architecture')}"), torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model = _construct(framework, info, config)
        except (NotImplementedError, RuntimeError):
            # Some constructors look at values, which the meta device has not got.
            return frozen(_construct(framework, info, config))
        if values and _computes_values(model):
            model = _construct(framework, info, config)
    return frozen(model)


def _construct(framework: str, info: dict[str, Any], config: Any) -> nn.Module:
    if framework == "timm":
        import timm
        from timm.models import PretrainedCfg

        known = {field.name for field in dataclasses.fields(PretrainedCfg)}
        described = {k: _tuples(v) for k, v in info["pretrained_cfg"].items() if k in known}
        args = {k: _tuples(v) for k, v in info["model_args"].items()}
        model: nn.Module = timm.create_model(info["architecture"], pretrained_cfg=described, **args)
        return model
    if framework == "transformers":
        import transformers

        from modhifi.models.from_transformers import auto_class

        model = getattr(transformers, auto_class(config)).from_config(config, trust_remote_code=False)
        return model
    raise ModhifiError("a module of your own has no factory to build it; pass skeleton=, the dense module")


def _tuples(value: Any) -> Any:
    """JSON has lists where timm's arguments are tuples."""
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
    ours, theirs = first.state_dict(), second.state_dict()
    return {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def same_modules(skeleton: nn.Module, model: nn.Module) -> bool:
    """Whether two models have the same modules under the same names, whatever their shapes."""
    ours, theirs = ({n: _class(m) for n, m in whole.named_modules()} for whole in (skeleton, model))
    return ours == theirs


def _class(module: nn.Module) -> str:
    """The name of a module's class, in full: every graph of torch.fx has a class of its own."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def differences(skeleton: nn.Module, model: nn.Module) -> Differences:
    """What has to change in ``skeleton`` before it can take the weights of ``model``; JSON-able.

    ``shapes`` maps names of the state dict to their shape, None where the tensor is gone; ``attributes`` maps module
    names to integer attributes; ``dtypes`` maps non-persistent buffers to their dtype.
    """
    before, after = skeleton.state_dict(), model.state_dict()
    shapes: dict[str, Any] = {
        name: list(tensor.shape)
        for name, tensor in after.items()
        if name not in before or before[name].shape != tensor.shape
    }
    shapes |= dict.fromkeys(before.keys() - after.keys())
    attributes = {}
    dense = dict(skeleton.named_modules())
    own = getattr(model, "config", None)
    for name, module in model.named_modules():
        old = vars(dense[name])
        changed = {k: v for k, v in vars(module).items() if _counts(v) and (k not in old or old[k] != v)}
        if "config" in old and module is not model and hasattr(module.config, "to_dict") and module.config is not own:
            mine, theirs = vars(module.config), vars(old["config"])  # a copy made for this layer alone
            changed |= {f"config.{k}": v for k, v in mine.items() if type(v) is int and theirs.get(k) != v}
        if changed:
            attributes[name] = changed
    computed = computed_buffers(skeleton)
    dtypes = {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in computed_buffers(model).items()
        if name in computed and computed[name].dtype != buffer.dtype
    }
    return {"shapes": shapes, "attributes": attributes, "dtypes": dtypes}


def _counts(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(_counts(v) for v in value)
    return isinstance(value, int) and not isinstance(value, bool)


def reshape(model: nn.Module, changes: Differences) -> nn.Module:
    """Apply :func:`differences` in place: empty tensors of the recorded shapes, and the recorded counts."""
    with explained("the skeleton"):
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
                set_count(model.get_submodule(name), attribute, _tuples(value))
        for name, dtype in changes["dtypes"].items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            module._buffers[leaf] = getattr(module, leaf).to(getattr(torch, dtype))
    return model


def fill(model: nn.Module, state: dict[str, Tensor], tied: dict[str, str], source: str) -> nn.Module:
    """Assign the model its weights and tie again what was tied; ModhifiError if they do not fit."""
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


def record(loaded: LoadedModel, edited: nn.Module) -> tuple[str, Differences]:
    """The framework that can rebuild ``edited``, and its differences to the dense architecture.

    A model that its library would build with other modules (one changed by hand) is recorded as ``torch``: loading it
    needs the dense module.
    """
    if loaded.framework != "torch":
        try:
            skeleton = build_skeleton(loaded.framework, loaded.info, own_config(edited), values=False)
            if same_modules(skeleton, edited):
                return loaded.framework, differences(skeleton, edited)
        except ModhifiError:
            pass  # the library cannot build it alone, remote code for instance
    if not same_modules(loaded.model, edited):
        raise ModhifiError("the edited model has other modules than the one it was made from; it cannot be saved")
    earlier: Differences = {} if loaded.artifact is None else loaded.artifact.manifest.model.differences
    now = differences(loaded.model, edited)
    return "torch", {
        "shapes": earlier.get("shapes", {}) | now["shapes"],
        "attributes": _merge(earlier.get("attributes", {}), now["attributes"]),
        "dtypes": earlier.get("dtypes", {}) | now["dtypes"],
    }


def _merge(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: old.get(name, {}) | new.get(name, {}) for name in old | new}


def is_stock(edited: nn.Module, loaded: LoadedModel, config: Any, changes: dict[str, Any]) -> bool:
    """Whether the configuration alone says all: a model built from it, with these weights, is the same function."""
    if changes["shapes"] or changes["dtypes"]:
        return False
    if not changes["attributes"]:
        return True
    # Counts that no forward pass looks at may differ, a layer's note of its former width for instance.
    plain = fill(build_skeleton(loaded.framework, loaded.info, config), edited.state_dict(), {}, loaded.source)
    plain.to(next(edited.parameters()).device)
    with torch.inference_mode():
        return torch.equal(loaded.logits(loaded.example, plain), loaded.logits(loaded.example, edited))


def own_config(model: Any) -> Any:
    """A copy of a transformers model's configuration that names its class; None for other models."""
    config = copy.deepcopy(getattr(model, "config", None))
    if config is not None:
        config.architectures = [type(model).__name__]
    return config


def read_config(directory: Path) -> Any:
    """The transformers configuration in an artefact."""
    import transformers

    with explained(str(directory)):
        return without_code(transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=False))
