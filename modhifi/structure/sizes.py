"""A model's size as a function of the groups' widths. Pure but for one look at the model's shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from modhifi.structure.depth import inside as inside_of
from modhifi.structure.groups import Group, Structure
from modhifi.structure.operators import last_wide
from modhifi.structure.places import holder, operator_at
from modhifi.structure.plan import Plan


@dataclass(frozen=True)
class Term:
    """One module, or one product of tensors.

    ``macs`` and ``weights`` scale with both widths, ``others`` (bias, norm) with the output width. ``inputs`` and
    ``outputs`` map group names to channel positions per component; the totals are the dense widths,
    ``module`` its name, empty for a product. ``parts`` are the blocks and sublayers that it lies in, each as a group
    and the number of its component.
    """

    macs: int
    weights: int
    others: int
    inputs: Mapping[str, float]
    input_total: int
    outputs: Mapping[str, float]
    output_total: int
    module: str = ""
    parts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Depth:
    """Which blocks and sublayers are there at any widths: ``order`` has for each group its components as they go."""

    order: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def has(self, parts: Iterable[tuple[str, int]], widths: Mapping[str, int]) -> bool:
        """Whether all of ``parts`` are there."""
        for name, component in parts:
            order = self.order[name]
            if component in order[: len(order) - widths.get(name, len(order))]:
                return False
        return True

    def ordered(self, removed: Mapping[str, Sequence[int]]) -> Depth:
        """With the components of some groups in another order of removal, of which ``removed`` has the first ones."""
        orders = {
            name: (*first, *(component for component in self.order[name] if component not in first))
            for name, first in removed.items()
            if name in self.order
        }
        return Depth({**self.order, **orders})

    def of(self, plan: Plan) -> Depth:
        """With the components that a plan removes as the first to go."""
        kept = {name: set(plan.kept[name]) for name in self.order if name in plan.kept}
        return self.ordered({name: [i for i in self.order[name] if i not in own] for name, own in kept.items()})


def width(positions: Mapping[str, float], total: int, full: Mapping[str, int], widths: Mapping[str, int]) -> float:
    """What stays of ``total`` channel positions, of which ``positions`` says how many a component of a group has."""
    return total - sum(m * (full[g] - widths.get(g, full[g])) for g, m in positions.items())


@dataclass(frozen=True)
class Sizes:
    """Size of the model for any widths: ``full`` maps group names to their dense number of components.

    ``cached`` maps groups of heads to the keys and values, in numbers per token, that one component keeps;
    ``fixed_cache`` are those of heads that must stay, ``fixed_macs`` the multiply-adds that no width changes.
    ``depth`` says which blocks and sublayers go first, ``inside`` in which of them a group lies.
    """

    terms: tuple[Term, ...]
    full: Mapping[str, int]
    fixed_parameters: int
    cached: Mapping[str, int] = field(default_factory=dict)
    fixed_cache: int = 0
    fixed_macs: int = 0
    depth: Depth = Depth()
    inside: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)

    def ordered(self, removed: Mapping[str, Sequence[int]]) -> Sizes:
        """With blocks and sublayers that go in this order; see :meth:`Depth.ordered`."""
        return replace(self, depth=self.depth.ordered(removed))

    def of(self, plan: Plan) -> Sizes:
        """With the blocks and sublayers that a plan removes as the first to go."""
        return replace(self, depth=self.depth.of(plan))

    def macs(self, widths: Mapping[str, int]) -> float:
        """Multiply-adds per sample."""
        return self.fixed_macs + sum(t.macs * self.share(t, widths) for t in self.terms)

    def parameters(self, widths: Mapping[str, int]) -> float:
        """Number of parameters."""
        total = float(self.fixed_parameters)
        for t in self.terms:
            if not self.depth.has(t.parts, widths):
                continue
            out = self._share(t.outputs, t.output_total, widths)
            total += t.weights * self._share(t.inputs, t.input_total, widths) * out + t.others * out
        return total

    def components(self, widths: Mapping[str, int]) -> float:
        """Number of components in all groups."""
        return float(sum(widths.get(name, n) for name, n in self.full.items()))

    def cache(self, widths: Mapping[str, int]) -> float:
        """Numbers per token in the KV cache of a causal language model."""
        return self.fixed_cache + float(
            sum(
                m * widths.get(name, self.full[name])
                for name, m in self.cached.items()
                if self.depth.has(self.inside.get(name, ()), widths)
            )
        )

    def share(self, term: Term, widths: Mapping[str, int]) -> float:
        """The share of a term's multiply-adds that stays."""
        if not self.depth.has(term.parts, widths):
            return 0.0
        return self._share(term.inputs, term.input_total, widths) * self._share(term.outputs, term.output_total, widths)

    def _share(self, positions: Mapping[str, float], total: int, widths: Mapping[str, int]) -> float:
        return width(positions, total, self.full, widths) / total if total else 1.0

    def touching(self) -> dict[str, Sizes]:
        """For each group the terms that its width changes: what a greedy step needs to look at."""
        terms: dict[str, list[Term]] = defaultdict(list)
        for term in self.terms:
            for name in {*term.inputs, *term.outputs, *(name for name, _ in term.parts)}:
                terms[name].append(term)
        return {name: Sizes(tuple(own), self.full, 0, depth=self.depth) for name, own in terms.items()}


def sizes_of(model: nn.Module, structure: Structure) -> Sizes:
    """Read the shapes of every module that a prunable group touches, and of every operator."""
    inputs: dict[str, dict[str, int]] = defaultdict(dict)
    outputs: dict[str, dict[str, int]] = defaultdict(dict)
    places, tables = dict.fromkeys(structure.operators), dict[str, str]()
    axes = structure.table_axes
    for group in structure.prunable:
        for piece in (piece for piece in group.slices if piece.role != "argument"):
            places[piece.module] = None
            if piece.role in ("along", "rows", "biases", "matrices"):
                tables[piece.module] = piece.role
            table = inputs if piece.role == "reader" else outputs
            table[piece.module][group.name] = piece.index.shape[1]
    whole = [(part, (g.name, number)) for g in structure.prunable for number, part in enumerate(g.parts)]
    for name, module in model.named_modules() if whole else ():
        own = [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        if own and parts_of(name, whole) and not any(parameter in places for parameter in own):
            places[name] = None
    terms, counted = [], 0
    for name in places:
        place = getattr(*holder(model, name))
        if isinstance(place, nn.Parameter) and name in structure.operators and place.ndim == 2:
            rows, columns = place.shape
            macs = structure.operators[name].macs
            terms.append(
                Term(macs, place.numel(), 0, inputs[name], columns, outputs[name], rows, name, parts_of(name, whole))
            )
            counted += place.numel()
            continue
        if isinstance(place, Tensor) and (name in tables or place.ndim < 3):
            role = tables.get(name)
            axis = axes.get(name, 0) if role in ("rows", "matrices") else last_wide(place)
            total = place.numel() if role == "biases" else place.shape[axis]
            if not isinstance(place, nn.Parameter):
                continue
            terms.append(Term(0, 0, place.numel(), {}, 0, outputs[name], total, parts=parts_of(name, whole)))
            counted += place.numel()
            continue
        place = operator_at(model, name)
        counts = {k: p.numel() for k, p in place.named_parameters(recurse=False)}
        weights = counts.get("weight", 0)
        operator = structure.operators.get(name)
        bias = getattr(place, "bias", None)
        out_total = len(bias) if isinstance(bias, Tensor) else _width(place, "out")
        along = operator is None or not inputs[name] and _width(place, "in") == 0
        counted += sum(counts.values())
        terms.append(
            Term(
                0 if operator is None else operator.macs,
                0 if along else weights,
                sum(counts.values()) - (0 if along else weights),
                inputs[name],
                _width(place, "in"),
                outputs[name],
                out_total,
                name,
                parts_of(name, whole),
            )
        )
    prunable = {g.name for g in structure.prunable}
    inside = {g.name: _parts_of_group(g, whole) for g in structure.groups}
    for work in structure.work:
        positions = {name: p for name, p in work.positions.items() if name in prunable}
        lies_in = [inside.get(name, ()) for name in work.positions]
        parts = lies_in[0] if lies_in and all(own == lies_in[0] for own in lies_in) else ()
        terms.append(Term(work.macs, 0, 0, {}, 0, positions, work.total, parts=parts))
    fixed_macs = max(0, structure.macs - sum(t.macs for t in terms))
    total = sum(p.numel() for p in model.parameters())
    full = {g.name: g.n for g in structure.prunable}
    # a reader takes the values of every query head, and a key is as wide as a value
    attending = [] if _keeps_latents(model) else [g for g in structure.groups if _attends(g)]
    cached = {g.name: 2 * g.readers[0].index.shape[1] // g.queries for g in attending}
    fixed = sum(g.n * cached[g.name] for g in structure.refused if g.name in cached)
    return Sizes(
        tuple(terms),
        full,
        total - counted,
        {n: m for n, m in cached.items() if n in full},
        fixed,
        fixed_macs,
        Depth({g.name: tuple(range(g.n)) for g in structure.prunable if g.parts}),
        inside,
    )


Whole = Sequence[tuple[str, tuple[str, int]]]
"""The modules that may go whole, each with its group and its number there."""


def parts_of(name: str, whole: Whole) -> tuple[tuple[str, int], ...]:
    """The blocks and sublayers that a module or parameter lies in."""
    return tuple(component for part, component in whole if inside_of(name, (part,)))


def _parts_of_group(group: Group, whole: Whole) -> tuple[tuple[str, int], ...]:
    """The blocks and sublayers that a group lies in altogether."""
    places = [set(parts_of(piece.module, whole)) for piece in group.slices]
    return tuple(sorted(set.intersection(*places))) if places else ()


def _keeps_latents(model: nn.Module) -> bool:
    """Whether what attention caches is one latent for all heads, which no head takes along (DeepSeek-V2)."""
    return any(getattr(getattr(module, "config", None), "kv_lora_rank", None) for module in model.modules())


def _attends(group: Group) -> bool:
    return group.kind == "heads" and bool(group.readers)


def _width(module: nn.Module, side: str) -> int:
    for name in _WIDTHS[side]:
        if hasattr(module, name):
            return int(getattr(module, name))
    weight = getattr(module, "weight", None)
    return len(weight) if side == "out" and weight is not None else 0


_WIDTHS = {
    "in": ("in_channels", "in_features", "nx"),
    "out": ("out_channels", "out_features", "nf", "num_features", "num_channels"),
}
