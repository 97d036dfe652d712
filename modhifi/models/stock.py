"""What a model's stock configuration can say of its widths: found by setting fields and building on the meta device."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from modhifi.models.loaded import LoadedModel
from modhifi.models.plain_copy import normed_again
from modhifi.models.skeleton import build_skeleton, own_config, same_function
from modhifi.structure.families import says
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink

Shapes = Mapping[str, torch.Size]
# A field of the configuration, or of one inside it, with the value that it is given.
Change = tuple[tuple[str, ...], Any]
# Names of fields that a cut usually changes: they are tried first.
LIKELY = re.compile(r"intermediate|inner|ffn|d_ff|hidden_dim|mlp|experts$|heads?$")
# Widths of a single thing, not numbers of things.
SIZES = re.compile(r"dim$|size$")
# But that of a head, of which there are several.
OF_ONE_HEAD = re.compile(r"head_dim$")
# At most so many models are built for one answer.
BUILDS = 32


def stating(edited: nn.Module, original: LoadedModel) -> nn.Module:
    """The model, whose configuration says its widths, in place, where a stock model of other fields is the same.

    It has the same shapes and outputs. A model of another framework stays as it is.
    """
    old = getattr(edited, "config", None)
    if original.framework == "transformers" and old is not None:
        # The shapes of few wide heads are those of many narrow ones.
        same = partial(same_function, edited, original)
        config = stock_config(original, own_config(edited), shapes_of(edited), same)
        for module in edited.modules() if config is not None else ():
            if getattr(module, "config", None) is old:
                module.config = config  # type: ignore[assignment]
    return edited


def can_say(loaded: LoadedModel, structure: Structure, kind: str) -> bool:
    """Whether a stock configuration can say half of all components of one kind."""
    kept = {}
    for group in structure.prunable:
        if group.kind == kind:
            parts = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
            members = [(parts == label).nonzero().flatten() for label in parts.unique()]
            kept[group.name] = tuple(
                sorted(int(i) for m in members for i in m[: max(1, len(m) // (2 * group.multiple)) * group.multiple])
            )
    if loaded.framework != "transformers":
        return says(loaded.model, kind)
    if any(group.of("argument") for group in structure.prunable if group.name in kept):
        return False  # what a module takes of its arguments is no shape
    narrow = normed_again(shrink(on_meta(loaded.model), structure, Plan(kept)), loaded.info.get("weight_norms", {}))
    return stock_config(loaded, own_config(narrow), shapes_of(narrow)) is not None


def on_meta(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes and no values."""
    tensors = [*model.parameters(), *model.buffers()]
    empty = {id(t): _without_values(t) for t in tensors}
    return copy.deepcopy(model, empty)


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of a model's state."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def stock_config(
    loaded: LoadedModel, config: Any, wanted: Shapes, same: Callable[[Any], bool] = lambda config: True
) -> Any | None:
    """The configuration whose stock model has the ``wanted`` shapes, found from ``config``; None where none is found.

    Fields change one after the other, or heads with what counts them together, as long as more shapes agree.
    """
    if not hasattr(config, "to_dict"):
        return None
    builds = 0

    def build(candidate: Any) -> Shapes | None:
        nonlocal builds
        builds += 1
        try:
            return shapes_of(build_skeleton(loaded.framework, loaded.info, candidate, values=False))
        except Exception:  # a configuration, or a class, that refuses this value
            return None

    shapes = build(config)
    if shapes is not None and _uneven(shapes, wanted):
        return None
    while shapes is not None and shapes != wanted:
        agreeing = _agreeing(shapes, wanted)
        for changes in dict.fromkeys(_candidates(config, shapes, wanted)):
            candidate = _changed(config, changes)
            found = None if candidate is None or builds >= BUILDS else build(candidate)
            if found is not None and _agreeing(found, wanted) > agreeing and (found != wanted or same(candidate)):
                config, shapes = candidate, found
                break
        else:
            return None
    return config if shapes == wanted and same(config) else None


def _uneven(shapes: Shapes, wanted: Shapes) -> bool:
    """Whether layers whose names differ in the number of a block alone were alike and are not now."""
    seen: dict[tuple[str, torch.Size | None], torch.Size] = {}
    alike = ((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), shapes.get(name), shape) for name, shape in wanted.items())
    return any(seen.setdefault((name, dense), shape) != shape for name, dense, shape in alike)


def _agreeing(shapes: Shapes, wanted: Shapes) -> int:
    return sum(shapes.get(name) == shape for name, shape in wanted.items()) if shapes.keys() == wanted.keys() else -1


def _candidates(config: Any, shapes: Shapes, wanted: Shapes) -> Iterator[tuple[Change, ...]]:
    """Changes that could turn one of the widths into the one that is wanted, likely ones first."""
    pairs: dict[tuple[int, int], int] = {}
    for name, shape in wanted.items():
        for before, after in zip(shapes.get(name, shape), shape, strict=False):
            if before != after:
                pairs[before, after] = pairs.get((before, after), 0) + 1
    fields = sorted(_fields(config), key=lambda field: not LIKELY.search(field[0][-1]))
    for (before, after), _ in sorted(pairs.items(), key=lambda item: -item[1]):
        share = after / before
        exact = [((path, after),) for path, value in fields if value == before and type(value) is int]
        unset = [
            ((path, after),) for path, value in fields if value is None and path[-1].endswith(("inner", "size", "dim"))
        ]
        ratios = [((path, value * share),) for path, value in fields if type(value) is float and "ratio" in path[-1]]
        yield from exact
        yield from _heads(fields, before, after, {size for shape in shapes.values() for size in shape})
        yield from unset
        yield from ratios
        yield from (
            ((path, value * after // before),)
            for path, value in fields
            if type(value) is int
            and value > 1
            and before % value == 0
            and (OF_ONE_HEAD.search(path[-1]) or not SIZES.search(path[-1]))
            and value != before
            and value * after % before == 0
        )


def _heads(
    fields: list[tuple[tuple[str, ...], Any]], before: int, after: int, sizes: set[int]
) -> Iterator[tuple[Change, ...]]:
    """Fewer heads of the same size: all fields that count heads change together, and the size is said.

    Likely is a head of which as many as every field counts are one of the ``sizes`` that the model has.
    """
    values = {path: value for path, value in fields if path[-1].endswith(("heads", "n_head"))}
    counted = [
        (path, heads)
        for path, heads in values.items()
        if type(heads) is int and heads > 1 and before % heads == 0 and heads * after % before == 0
    ]

    def odd(path: tuple[str, ...], heads: int) -> int:
        among = [v for p, v in values.items() if p[:-1] == path[:-1] and type(v) is int]
        return sum(v * before // heads not in sizes for v in among)

    for path, heads in sorted(counted, key=lambda field: odd(*field)):
        owner = path[:-1]
        counts = [
            ((*owner, p[-1]), v * after // before)
            for p, v in values.items()
            if p[:-1] == owner and _scales(v, before, after)
        ]
        # Classes read it where it is there, whether their configurations have such a field or not.
        size = ((*owner, "head_dim"), before // heads)
        yield tuple(counts)
        yield (*counts, size)
        yield ((path, heads * after // before), size)


def _scales(value: Any, before: int, after: int) -> bool:
    return type(value) is int and value * after % before == 0 and value * after // before > 0


def _fields(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The fields of a configuration and of those inside it that are numbers or unset."""
    for name, value in vars(config).items():
        if name.startswith("_") or name in NOT_WIDTHS:
            continue
        if hasattr(value, "to_dict"):
            yield from _fields(value, (*path, name))
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield (*path, name), value


# Fields that no cut changes.
NOT_WIDTHS = frozenset(
    "vocab_size hidden_size n_embd d_model num_hidden_layers n_layer num_layers max_position_embeddings n_positions "
    "pad_token_id bos_token_id eos_token_id dtype torch_dtype image_size patch_size num_labels".split()
)


def _changed(config: Any, changes: tuple[Change, ...]) -> Any | None:
    """The configuration with some fields changed; None where it refuses them."""
    new = copy.deepcopy(config)
    try:
        for path, value in changes:
            part = new
            for name in path[:-1]:
                part = getattr(part, name)
            setattr(part, path[-1], value)
        if hasattr(new, "validate"):  # transformers 5.4 and later check widths against each other
            new.validate()
    except Exception:  # each class has its own ways to refuse
        return None
    return new
