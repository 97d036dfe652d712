"""What kind of components a group has, and which integers of the model's modules count them."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from modhifi.structure.groups import Group
from modhifi.structure.library_layers import is_transposed
from modhifi.structure.places import holder, operator_at
from modhifi.structure.recurrent import Gates
from modhifi.structure.stacked import Stacked

HEADS = re.compile(r"(^|_|\.)(heads?|mp_num)$")  # num_heads, n_head, num_key_value_heads; shards of heads
# all_head_size, dim_out_qk, hidden_size_output
WIDTHS = re.compile(r"(^|_)(dim|size)(_out_(qk|v)|_output|_projection)?$")
# v_head_dim, val_dim, val_attn_dim, v_channels: of the values of one head, or of all
VALUES = re.compile(r"^out_dim$|(^|_)v(al(ue)?)?_((head|attn)_)?(dim|size|channels(_per_head)?)$")
SHARING = re.compile(r"num_(key_value|kv)_groups$")  # query heads to one key-value head
# widths of one head, and sizes of something else
OTHERS = re.compile(r"(^|\.)((attention_|attn_)?head_(dim|size)|d_head)$|window|patch|block|kernel|chunk|vocab|grid")


def with_head_counts(model: nn.Module, group: Group) -> Group:
    """The group with its kind, and for heads with the attributes of the modules around that count them.

    A name does not say what a model's code does with such an integer: a pass with fewer heads has to show that it
    still computes the same (:func:`modhifi.structure.trial_cut.confirm`).
    """
    if group.kind == "neurons":
        linear = all(_is_linear(operator_at(model, s.module)) for s in group.producers)
        linear = linear and not any(isinstance(getattr(*holder(model, s.module)), nn.Conv1d) for s in group.of("along"))
        return group if linear else replace(group, kind="channels")
    if group.kind == "channels":
        return group
    if group.kind == "ranks":
        read = {group.n * s.index.shape[1]: s.index.shape[1] for s in group.readers}
        return replace(group, attributes=_counting(model, group, ((VALUES, read | {group.n: 1}),)))
    heads = {group.n * group.queries: group.queries, group.n: 1}
    widths = {group.n * s.index.shape[1]: s.index.shape[1] for s in group.slices if s.role not in ("along", "argument")}
    # Where queries, keys and values are one matrix, what reads the heads shows how wide one of them is.
    widths |= {group.n * (wide := s.index.shape[1] // group.queries): wide for s in group.readers}
    # Where components are query heads of their own, each with its key-value head, this integer is 1.
    sharing = {group.n: 1} if group.queries == 1 < group.n else {}
    table = (HEADS, heads), (WIDTHS, widths), (SHARING, sharing)
    return replace(group, attributes=_counting(model, group, table))


def _counting(
    model: nn.Module, group: Group, table: Iterable[tuple[re.Pattern[str], dict[int, int]]]
) -> tuple[tuple[str, str, int], ...]:
    """The attributes around a group of which a pattern knows the name, with the amount of one component by value."""
    counting = []
    for name in _around(group):
        for attribute, value in _integers(model.get_submodule(name)):
            for pattern, amount in table:
                counts = pattern.search(attribute) and not OTHERS.search(attribute)
                if counts and value in amount:
                    counting.append((name, attribute, amount[value]))
    return tuple(counting)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Stacked | Gates) or is_transposed(module)


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """A module's integer attributes, and those of its configuration (``config.NAME``) that its forward pass reads."""
    values = dict(vars(module))
    if hasattr(values.get("config"), "to_dict"):
        try:
            read = re.findall(r"self\.config\.(\w+)", inspect.getsource(type(module).forward))
        except OSError:
            read = []  # a class without a source file
        values |= {f"config.{name}": getattr(module.config, name, None) for name in read}
    yield from ((name, value) for name, value in values.items() if type(value) is int)


def shorten(module: nn.Module, attribute: str, removed: int) -> None:
    """Take channels off an integer that counts a piece of them; ``sizes.0`` is the first entry of a list or tuple."""
    name, _, at = attribute.partition(".")
    value = getattr(module, name)
    if at:
        entries = list(value)
        entries[int(at)] -= removed
        setattr(module, name, type(value)(entries))
    else:
        setattr(module, name, value - removed)


def set_count(module: nn.Module, attribute: str, value: int) -> None:
    """Set a counting attribute; one of a configuration on a copy of it, as other layers share the configuration."""
    name, _, field = attribute.rpartition(".")
    if name:
        setattr(module, name, copy.copy(getattr(module, name)))
    setattr(getattr(module, name) if name else module, field, value)


def _around(group: Group) -> Iterator[str]:
    """The modules that hold the group's layers, up to the one that holds them all."""
    paths = [piece.module.split(".")[:-1] for piece in group.slices]
    common = 0
    while all(len(p) > common and p[common] == paths[0][common] for p in paths):
        common += 1
    yield from dict.fromkeys(".".join(p[:end]) for p in paths for end in range(common, len(p) + 1))
