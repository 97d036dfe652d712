"""The memory that a pass takes, as a function of the groups' widths. Pure: what was seen goes in, bytes come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from modhifi.structure.plan import Plan
from modhifi.structure.sizes import Sizes, Term, width


@dataclass(frozen=True)
class Footprint:
    """Bytes of weights, of ``each`` bytes a parameter, and of the most results that a pass holds at once.

    ``instants`` ``(instants, writers + 1)`` are the bytes that stood in memory at every instant of the dense model's
    pass, by the operator that wrote them last, of ``writers``, and those of none; they shrink with that operator's
    output. See `structure.gauge.Gauge`.
    """

    sizes: Sizes
    each: float
    writers: tuple[Term, ...]
    instants: np.ndarray
    at_once: int = field(default=1, init=False)

    def amount(self, widths: Mapping[str, int]) -> float:
        """Bytes."""
        return self.each * self.sizes.parameters(widths) + float(self.held(widths).max())

    def held(self, widths: Mapping[str, int]) -> np.ndarray:
        """The bytes of results ``(instants,)`` that stand in memory at every instant."""
        held: np.ndarray = self.instants @ np.array([*(self._share(term, widths) for term in self.writers), 1.0])
        return held

    def _share(self, term: Term, widths: Mapping[str, int]) -> float:
        if not self.sizes.depth.has(term.parts, widths):
            return 0.0
        return width(term.outputs, term.output_total, self.sizes.full, widths) / max(1, term.output_total)

    def seen(self, rows: np.ndarray) -> Footprint:
        """What is held at those instants alone."""
        return replace(self, instants=self.instants[rows])

    @property
    def rest(self) -> float:
        """Nothing: the bytes are no sum over operators."""
        return 0.0

    def by_operator(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Empty: the bytes are no sum over operators."""
        return {}

    def touching(self) -> dict[str, Footprint]:
        """For each group the parameters that its width changes, and all results, of which the most at once count."""
        return {name: replace(self, sizes=own) for name, own in self.sizes.touching().items()}

    def ordered(self, removed: Mapping[str, Sequence[int]]) -> Footprint:
        """With blocks and sublayers that go in this order; see `structure.sizes.Depth.ordered`."""
        return replace(self, sizes=self.sizes.ordered(removed))

    def of(self, plan: Plan) -> Footprint:
        """With the blocks and sublayers that a plan removes as the first to go."""
        return replace(self, sizes=self.sizes.of(plan))
