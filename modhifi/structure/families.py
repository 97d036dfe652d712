"""How the configuration of each family of transformers says the widths that pruning changes.

One row a family, named by its ``model_type`` in transformers and by its class in timm, whose models are described by
the arguments of their factory; see ``docs/families.md`` for how to add one. Nothing else depends on a family: what can
be pruned is found by watching the model run.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from modhifi.structure.groups import Structure


@dataclass(frozen=True)
class Family:
    """Names of configuration fields: the feed-forward width, the numbers of query and key-value heads, the head's size.

    ``heads`` is None where fewer heads cannot be said, because the head's size is always the hidden size over their
    number. ``ratio`` names a field that holds the feed-forward width over the block's own width, ``depth`` the argument
    of timm's factory that holds the number of blocks, for each of the lists of blocks that follow.
    """

    ffn: str | None = "intermediate_size"
    ratio: str | None = None
    heads: str | None = None
    kv: str | None = None
    head_dim: str | None = None
    depth: tuple[str, ...] = ()


GROUPED = Family(heads="num_attention_heads", kv="num_key_value_heads", head_dim="head_dim")
VISION = Family(heads="num_attention_heads", head_dim="head_dim")
FIXED_HEADS = Family()
RATIO = Family(ffn=None, ratio="mlp_ratio")
PLAIN = replace(RATIO, depth=("depth", "blocks"))
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"), GROUPED),
    **dict.fromkeys(("phi3", "mixtral", "qwen3_moe"), GROUPED),
    **dict.fromkeys(("vit", "deit", "beit"), VISION),
    **dict.fromkeys(("bert", "roberta", "gpt_neox"), FIXED_HEADS),
    "gpt2": Family(ffn="n_inner"),
    "opt": Family(ffn="ffn_dim"),
    "distilbert": Family(ffn="hidden_dim"),
    **dict.fromkeys(("swin", "SwinTransformer"), RATIO),
    **dict.fromkeys(("VisionTransformer", "VisionTransformerDistilled", "Beit"), PLAIN),
    "ResNet": Family(ffn=None, depth=("layers", *(f"layer{n}" for n in range(1, 5)))),
    "ConvNeXt": Family(ffn=None, depth=("depths", *(f"stages.{n}.blocks" for n in range(4)))),
    "dinov2": Family(ffn=None, heads="num_attention_heads", head_dim="head_dim"),  # its mlp_ratio is an integer
}


def says(model: nn.Module, kind: str) -> bool:
    """Whether the model's own configuration can say another number of ``heads`` or ``neurons``."""
    family = _family(model)
    if family is None:
        return False
    return family.heads is not None if kind == "heads" else bool(family.ffn or family.ratio)


def restate(model: nn.Module, structure: Structure, widths: Mapping[str, int]) -> None:
    """Let the model's configuration say its new widths, in components per group, as far as it can; in place.

    A kind is said where all its groups agree. Whether that is the whole truth is for whoever saves the model to check:
    what the configuration does not describe is recorded shape by shape.
    """
    _state_experts(model, structure, widths)
    family = _family(model)
    if family is None:
        return
    if not hasattr(model, "config"):
        ratio = _ratio(model, structure) if family.ratio is not None else None
        if ratio is not None:
            model._model_args = {**model._model_args, family.ratio: ratio}  # type: ignore[dict-item,assignment]
        return
    # Only transformers' models come here, which have imported it; importing it for others takes a second.
    from huggingface_hub.errors import StrictDataclassError

    for state in (_state_neurons, _state_heads):
        old: Any = model.config
        new = copy.deepcopy(old)
        try:
            state(new, family, model, structure, widths)
            if hasattr(new, "validate"):  # transformers 5.4 and later check widths against each other
                new.validate()
        except (ValueError, StrictDataclassError):  # heads that do not divide the hidden size, say
            continue
        for module in model.modules():
            if getattr(module, "config", None) is old:
                module.config = new


def restate_depth(model: nn.Module, parts: Mapping[str, int]) -> None:
    """Let the model's configuration say that blocks are to go, as far as it can; in place, while they are there.

    ``parts`` are those of :func:`modhifi.structure.depth.removed_parts`.
    """
    gone: dict[str, set[str]] = defaultdict(set)
    for name, outputs in parts.items():
        if not outputs:
            owner, _, leaf = name.rpartition(".")
            gone[owner].add(leaf)
    stay = {
        owner: [
            number for number, (leaf, _) in enumerate(model.get_submodule(owner).named_children()) if leaf not in leaves
        ]
        for owner, leaves in gone.items()
    }
    if hasattr(model, "_model_args"):
        family = _family(model)
        if family is not None and gone.keys() & set(family.depth[1:]):
            argument, *lists = family.depth
            counts = [len(stay[name]) if name in stay else len(model.get_submodule(name)) for name in lists]  # type: ignore[arg-type]
            model._model_args = {**model._model_args, argument: counts[0] if lists == ["blocks"] else counts}  # type: ignore[dict-item,assignment]
        return
    for owner, numbers in stay.items():
        count = len(numbers) + len(gone[owner])
        if getattr(getattr(model, "config", None), "num_hidden_layers", None) == count:
            _state_blocks(model, count, numbers)


def _state_blocks(model: nn.Module, count: int, stay: Sequence[int]) -> None:
    """Let the configuration say which of ``count`` blocks stay: their number, and what is listed for each of them."""
    old: Any = model.config
    new = copy.deepcopy(old)
    new.num_hidden_layers = len(stay)
    for name, value in list(vars(new).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(new, name, type(value)(value[number] for number in stay))
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def _state_experts(model: nn.Module, structure: Structure, widths: Mapping[str, int]) -> None:
    """Let every field that counts the experts say their new number, where all mixtures have as many; in place."""
    groups = [g for g in structure.groups if g.kind == "experts"]
    pairs = {(g.n, widths.get(g.name, g.n)) for g in groups}
    old: Any = getattr(model, "config", None)
    if len(pairs) != 1 or not hasattr(old, "to_dict"):
        return
    before, after = pairs.pop()
    new = copy.deepcopy(old)
    for part in (new, new.get_text_config()):
        for name, value in list(vars(part).items()):
            if type(value) is int and value == before and name.endswith("experts"):
                setattr(part, name, after)
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def _family(model: nn.Module) -> Family | None:
    if hasattr(model, "_model_args"):  # timm's factory leaves its arguments there
        return FAMILIES.get(type(model).__name__)
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def _state_neurons(
    config: Any, family: Family, model: nn.Module, structure: Structure, widths: Mapping[str, int]
) -> None:
    if family.ffn is not None:
        groups = [g for g in structure.groups if g.kind == "neurons" and g.readers]
        dense = getattr(config, family.ffn) or 4 * config.hidden_size  # GPT-2's None
        counts = {widths.get(g.name, g.n) for g in groups if g.n == dense}
        if len(counts) == 1:
            setattr(config, family.ffn, counts.pop())
    elif family.ratio is not None:
        ratio = _ratio(model, structure)
        if ratio is not None:
            setattr(config, family.ratio, ratio)


def _ratio(model: nn.Module, structure: Structure) -> float | None:
    """The number by which ``int(width * number)`` is every feed-forward layer's width, to the last neuron."""
    groups = [g for g in structure.groups if g.kind == "neurons" and g.readers]
    layers: list[Any] = [model.get_submodule(g.producers[0].module) for g in groups]
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    least = max((after / before for before, after in shapes), default=0.0)
    # A quotient of floats may fall short of its own product by the last digit.
    ratios = (least, math.nextafter(least, math.inf))
    return next((r for r in ratios if shapes and all(int(b * r) == a for b, a in shapes)), None)


def _state_heads(
    config: Any, family: Family, model: nn.Module, structure: Structure, widths: Mapping[str, int]
) -> None:
    groups = [g for g in structure.groups if g.kind == "heads"]
    counts = {(widths.get(g.name, g.n), g.queries) for g in groups}
    if family.heads is None or len(counts) != 1:
        return
    count, queries = counts.pop()
    if family.head_dim is not None:
        size = getattr(config, family.head_dim, None) or config.hidden_size // config.num_attention_heads
        setattr(config, family.head_dim, size)
    # One key-value head that all query heads share is no part of any component, and stays.
    if family.kv is not None and getattr(config, family.heads) == queries * getattr(config, family.kv):
        setattr(config, family.kv, count)
    setattr(config, family.heads, count * queries)
