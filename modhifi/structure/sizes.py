"""A model's size as a function of the groups' widths. Pure but for one look at the model's shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from modhifi.structure.groups import Group, Structure
from modhifi.structure.operators import last_wide
from modhifi.structure.stacked import holder, operator_at


@dataclass(frozen=True)
class Term:
    """One module, or one product of tensors.

    ``macs`` and ``weights`` scale with both widths, ``others`` (bias, norm) with the output width. ``inputs`` and
    ``outputs`` map group names to channel positions per component; the totals are the dense widths,
    ``module`` its name, empty for a product.
    """

    macs: int
    weights: int
    others: int
    inputs: Mapping[str, float]
    input_total: int
    outputs: Mapping[str, float]
    output_total: int
    module: str = ""


def width(positions: Mapping[str, float], total: int, full: Mapping[str, int], widths: Mapping[str, int]) -> float:
    """What stays of ``total`` channel positions, of which ``positions`` says how many a component of a group has."""
    return total - sum(m * (full[g] - widths.get(g, full[g])) for g, m in positions.items())


@dataclass(frozen=True)
class Sizes:
    """Size of the model for any widths: ``full`` maps group names to their dense number of components.

    ``cached`` maps groups of heads to the keys and values, in numbers per token, that one component keeps;
    ``fixed_cache`` are those of heads that must stay, ``fixed_macs`` the multiply-adds that no width changes.
    """

    terms: tuple[Term, ...]
    full: Mapping[str, int]
    fixed_parameters: int
    cached: Mapping[str, int] = field(default_factory=dict)
    fixed_cache: int = 0
    fixed_macs: int = 0

    def macs(self, widths: Mapping[str, int]) -> float:
        """Multiply-adds per sample."""
        return self.fixed_macs + sum(
            t.macs * self._share(t.inputs, t.input_total, widths) * self._share(t.outputs, t.output_total, widths)
            for t in self.terms
        )

    def parameters(self, widths: Mapping[str, int]) -> float:
        """Number of parameters."""
        total = float(self.fixed_parameters)
        for t in self.terms:
            out = self._share(t.outputs, t.output_total, widths)
            total += t.weights * self._share(t.inputs, t.input_total, widths) * out + t.others * out
        return total

    def components(self, widths: Mapping[str, int]) -> float:
        """Number of components in all groups."""
        return float(sum(widths.get(name, n) for name, n in self.full.items()))

    def cache(self, widths: Mapping[str, int]) -> float:
        """Numbers per token in the KV cache of a causal language model."""
        return self.fixed_cache + float(sum(m * widths.get(name, self.full[name]) for name, m in self.cached.items()))

    def _share(self, positions: Mapping[str, float], total: int, widths: Mapping[str, int]) -> float:
        return width(positions, total, self.full, widths) / total if total else 1.0

    def touching(self) -> dict[str, Sizes]:
        """For each group the terms that its width changes: what a greedy step needs to look at."""
        terms: dict[str, list[Term]] = defaultdict(list)
        for term in self.terms:
            for name in {*term.inputs, *term.outputs}:
                terms[name].append(term)
        return {name: Sizes(tuple(own), self.full, 0) for name, own in terms.items()}


def sizes_of(model: nn.Module, structure: Structure) -> Sizes:
    """Read the shapes of every module that a prunable group touches, and of every operator."""
    inputs: dict[str, dict[str, int]] = defaultdict(dict)
    outputs: dict[str, dict[str, int]] = defaultdict(dict)
    places, tables = dict.fromkeys(structure.operators), dict[str, str]()
    for group in structure.prunable:
        for piece in group.slices:
            places[piece.module] = None
            if piece.role in ("along", "biases", "matrices"):
                tables[piece.module] = piece.role
            table = inputs if piece.role == "reader" else outputs
            table[piece.module][group.name] = piece.index.shape[1]
    terms, counted = [], 0
    for name in places:
        place = getattr(*holder(model, name))
        if isinstance(place, Tensor) and (name in tables or place.ndim < 3):
            role = tables.get(name)
            total = {"biases": place.numel(), "matrices": place.shape[0]}.get(str(role), place.shape[last_wide(place)])
            if not isinstance(place, nn.Parameter):
                continue
            terms.append(Term(0, 0, place.numel(), {}, 0, outputs[name], total))
            counted += place.numel()
            continue
        place = operator_at(model, name)
        own = {k: p.numel() for k, p in place.named_parameters(recurse=False)}
        weights = own.get("weight", 0)
        operator = structure.operators.get(name)
        out_total = len(bias) if isinstance(bias := getattr(place, "bias", None), Tensor) else _width(place, "out")
        along = operator is None or not inputs[name] and _width(place, "in") == 0
        counted += sum(own.values())
        terms.append(
            Term(
                0 if operator is None else operator.macs,
                0 if along else weights,
                sum(own.values()) - (0 if along else weights),
                inputs[name],
                _width(place, "in"),
                outputs[name],
                out_total,
                name,
            )
        )
    prunable = {g.name for g in structure.prunable}
    for work in structure.work:
        positions = {name: p for name, p in work.positions.items() if name in prunable}
        terms.append(Term(work.macs, 0, 0, {}, 0, positions, work.total))
    fixed_macs = max(0, structure.macs - sum(t.macs for t in terms))
    total = sum(p.numel() for p in model.parameters())
    full = {g.name: g.n for g in structure.prunable}
    # a reader takes the values of every query head, and a key is as wide as a value
    cached = {g.name: 2 * g.readers[0].index.shape[1] // g.queries for g in structure.groups if _attends(g)}
    fixed = sum(g.n * cached[g.name] for g in structure.refused if g.name in cached)
    return Sizes(tuple(terms), full, total - counted, {n: m for n, m in cached.items() if n in full}, fixed, fixed_macs)


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
