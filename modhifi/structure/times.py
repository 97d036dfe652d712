"""A model's time as a function of the groups' widths. Pure: what was measured goes in, seconds come out.

An operator's time is bilinear between the points of a grid over its two widths; what is elementwise and the residual
stream take a time for each element that operators write. Three coefficients bring both to what whole networks took.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from modhifi.structure.plan import Plan
from modhifi.structure.sizes import Depth, Term, width


@dataclass(frozen=True)
class OperatorTime:
    """Seconds of one operator: ``seconds[i][j]`` at the input width ``inputs[i]`` and the output width ``outputs[j]``.

    ``elements`` are the numbers that it writes at full width. Devices take ``at_once`` channels at a time: a width in
    between takes as long as the next multiple, and one below the grid as long as its first point.
    """

    term: Term
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    elements: int
    at_once: int = 1

    def at(self, input_width: float, output_width: float) -> float:
        """The seconds at two widths, bilinear between the points of the grid."""
        (i, u), (j, v) = self._cell(self.inputs, input_width), self._cell(self.outputs, output_width)
        first = _between(self.seconds[i], j, v)
        return first if u == 0.0 else first + u * (_between(self.seconds[i + 1], j, v) - first)

    def _cell(self, points: Sequence[int], width: float) -> tuple[int, float]:
        """The point before a width, rounded up, and how far that is to the next one."""
        if width <= points[0] or len(points) == 1:
            return 0, 0.0
        width = min(math.ceil(width / self.at_once) * self.at_once, points[-1])
        cell = min(bisect_right(points, width) - 1, len(points) - 2)
        return cell, (width - points[cell]) / (points[cell + 1] - points[cell])


def _between(row: Sequence[float], cell: int, part: float) -> float:
    return row[cell] if part == 0.0 else row[cell] + part * (row[cell + 1] - row[cell])


@dataclass(frozen=True)
class Times:
    """Seconds of one pass for any widths; ``full`` maps group names to their dense number of components.

    ``scale`` multiplies the operators' times, ``per_element`` the numbers that they write; ``fixed`` is what no width
    changes, of which every operator has the same part. ``depth`` says which blocks and sublayers go first.
    """

    operators: tuple[OperatorTime, ...]
    full: Mapping[str, int]
    scale: float = 1.0
    per_element: float = 0.0
    fixed: float = 0.0
    depth: Depth = Depth()

    def ordered(self, removed: Mapping[str, Sequence[int]]) -> Times:
        """With blocks and sublayers that go in this order; see :meth:`Depth.ordered`."""
        return replace(self, depth=self.depth.ordered(removed))

    def of(self, plan: Plan) -> Times:
        """With the blocks and sublayers that a plan removes as the first to go."""
        return replace(self, depth=self.depth.of(plan))

    @property
    def rest(self) -> float:
        """Seconds that belong to no operator."""
        return self.fixed

    @property
    def at_once(self) -> int:
        """How many channels the device takes at a time."""
        return max((operator.at_once for operator in self.operators), default=1)

    def parts(self, widths: Mapping[str, int]) -> tuple[float, float, float]:
        """What the coefficients multiply: seconds of the operators as measured alone, elements that they write, and the
        share of the operators that is there."""
        seconds, elements, count = 0.0, 0.0, 0
        for operator in self.operators:
            if self.depth.has(operator.term.parts, widths):
                own, written = self._of(operator, widths)
                seconds, elements, count = seconds + own, elements + written, count + 1
        return seconds, elements, count / max(1, len(self.operators))

    def _of(self, operator: OperatorTime, widths: Mapping[str, int]) -> tuple[float, float]:
        term = operator.term
        inputs = width(term.inputs, term.input_total, self.full, widths)
        outputs = width(term.outputs, term.output_total, self.full, widths)
        return max(0.0, operator.at(inputs, outputs)), operator.elements * outputs / max(1, term.output_total)

    def amount(self, widths: Mapping[str, int]) -> float:
        """Seconds of one pass."""
        operators, elements, share = self.parts(widths)
        return self.scale * operators + self.per_element * elements + self.fixed * share

    def by_operator(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Seconds of every operator, with the elementwise work on what it writes."""
        result = {}
        for operator in self.operators:
            there = self.depth.has(operator.term.parts, widths)
            own, written = self._of(operator, widths) if there else (0.0, 0.0)
            result[operator.term.module] = self.scale * own + self.per_element * written
        return result

    def touching(self) -> dict[str, Times]:
        """For each group the operators that its width changes."""
        operators: dict[str, list[OperatorTime]] = defaultdict(list)
        whole = {name for operator in self.operators for name, _ in operator.term.parts}
        for operator in self.operators:
            for name in {*operator.term.inputs, *operator.term.outputs, *(name for name, _ in operator.term.parts)}:
                operators[name].append(operator)
        shares = {name: len(own) / len(self.operators) if name in whole else 0.0 for name, own in operators.items()}
        return {
            name: replace(self, operators=tuple(own), fixed=self.fixed * shares[name])
            for name, own in operators.items()
        }

    def fitted(self, networks: Sequence[tuple[Mapping[str, int], float]]) -> Times:
        """With the coefficients, none of them negative, that suit whole networks best: widths and seconds of each.

        Least squares of relative errors, over every choice of coefficients that may be above zero.
        """
        rows = np.array([self.parts(widths) for widths, _ in networks])
        seconds = np.array([taken for _, taken in networks])
        rows /= seconds[:, None]
        best, least = np.array([1.0, 0.0, 0.0]), np.inf
        for count in (1, 2, 3):
            for chosen in combinations(range(3), count):
                solution = np.zeros(3)
                solution[list(chosen)] = np.linalg.lstsq(rows[:, chosen], np.ones(len(rows)), rcond=None)[0]
                miss = float(((rows @ solution - 1) ** 2).sum())
                if (solution >= 0).all() and miss < least:
                    best, least = solution, miss
        scale, per_element, fixed = map(float, best)
        return replace(self, scale=scale, per_element=per_element, fixed=fixed)
