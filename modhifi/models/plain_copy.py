"""A copy of a module that a program holds: its own layers with plain weights, whatever was wrapped around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrizations import _WeightNorm, weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from modhifi.errors import ModhifiError
from modhifi.models.loaded import frozen
from modhifi.models.offload import own_copy

# Wrappers that add no computation, each with the attribute that holds the module.
WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def plain_copy(module: nn.Module, source: str) -> tuple[nn.Module, list[str]]:
    """A frozen copy on the CPU, and one sentence for each kind of thing that was taken off.

    Compiled, data-parallel and distributed modules are unwrapped. Weight and spectral norms, other parametrizations and
    pruning masks become plain weights. Raises ModhifiError for a scripted module, which has no layers to edit.
    """
    module, kinds = unwrapped(module)
    notes = [f"the model came in a {kind}, which was taken off" for kind in kinds]
    _refuse_scripted(module, source)
    copied = own_copy(module)
    notes += _unwrap_parts(copied, "")
    model = frozen(copied)
    for kind, count in Counter(_fold(model)).items():
        notes.append(f"{kind} of {count} weight{'s' * (count > 1)} folded in: the copy has plain weights")
    return _put_in_order(frozen(model)), notes


def in_order(model: nn.Module) -> nn.Module:
    """The model, or a copy where a tensor is not in the order of its axes, as files hold it: kernels round otherwise.

    ``channels_last`` is another order.
    """
    return _put_in_order(own_copy(model)) if any(map(_is_in_other_order, _tensors(model))) else model


def _put_in_order(model: nn.Module) -> nn.Module:
    for tensor in filter(_is_in_other_order, _tensors(model)):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.layout == torch.strided)


def _is_in_other_order(tensor: Tensor) -> bool:
    """By the strides: those of axes of length 1 are free, and torch chooses kernels by them all the same."""
    return tensor.stride() != torch.empty(tensor.shape, device="meta").stride()


def weight_norms(module: nn.Module) -> dict[str, tuple[str, int]]:
    """Where torch computes a weight by its weight norm alone: by the layer's name the weight's and the norm's axis."""
    norms = {}
    for name, part in module.named_modules():
        tables: Any = part.parametrizations if parametrize.is_parametrized(part) else {}
        for leaf, steps in tables.items():
            if [type(step) for step in steps] == [_WeightNorm]:
                norms[name] = leaf, int(steps[0].dim)
    return norms


def normed_again(model: nn.Module, norms: Mapping[str, tuple[str, int]]) -> nn.Module:
    """The model, some plain weights of which are computed by weight norms again, in place, as its library does."""
    for name, (leaf, dim) in norms.items():
        layer = model.get_submodule(name)
        if not parametrize.is_parametrized(layer, leaf):
            weight_norm(layer, leaf, dim)
    return model


def unwrapped(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module itself that a compiled, data-parallel or distributed one holds, and the kinds of what it was in."""
    kinds = []
    while (inner := _inside(module)) is not None:
        kinds.append(type(module).__name__)
        module = inner
    return module, kinds


def _unwrap_parts(module: nn.Module, prefix: str) -> Iterator[str]:
    """Unwrap every part of a module, in place; yields a sentence for each wrapper."""
    for leaf, child in list(module._modules.items()):
        if child is not None:
            inner, kinds = unwrapped(child)
            if kinds:
                setattr(module, leaf, inner)
            yield from (f"{prefix}{leaf} came in a {kind}, which was taken off" for kind in kinds)
            yield from _unwrap_parts(inner, f"{prefix}{leaf}.")


def _refuse_scripted(module: nn.Module, source: str) -> None:
    """Raise ModhifiError if any part of a module is scripted or traced."""
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            where = f"its part {name!r}" if name else "it"
            raise ModhifiError(f"{source}: {where} is scripted, whose layers cannot be edited; give the Python module")


def _inside(module: nn.Module) -> nn.Module | None:
    """The module in a wrapper; None for any other module."""
    kind = type(module)
    if kind.__module__.startswith("torch.") and kind.__name__ in WRAPPERS:
        inner = getattr(module, WRAPPERS[kind.__name__])
        return inner if isinstance(inner, nn.Module) else None
    return None


@torch.no_grad()
def _fold(model: nn.Module) -> Iterator[str]:
    """Make every weight that is computed from others a plain one, in place; yields what it was, for each."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            yield from _fold_parametrized(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
                _forget_hooks(module, SpectralNorm.__module__)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            else:
                continue
            yield "Mask" if isinstance(hook, prune.BasePruningMethod) else type(hook).__name__


def _fold_parametrized(module: nn.Module) -> Iterator[str]:
    """As torch removes parametrizations, but for its class, which belongs to the module that was copied as well."""
    tables: Any = module.parametrizations
    values = {name: getattr(module, name).detach().clone() for name in tables}
    for parts in tables.values():
        yield " and ".join(type(part).__name__.lstrip("_") for part in parts)
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    _forget_hooks(module, weight_norm.__module__)
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _forget_hooks(module: nn.Module, origin: str) -> None:
    """Remove what torch's module ``origin`` leaves on a folded layer: it looks for weights that are gone."""
    for table in (module._load_state_dict_pre_hooks, module._state_dict_hooks):
        for key in [k for k, v in table.items() if _origin(getattr(v, "hook", v)) == origin]:
            del table[key]


def _origin(hook: object) -> str:
    """The Python module of a function, or of the class of another object that is called."""
    return str(hook.__module__) if isfunction(hook) else type(hook).__module__
