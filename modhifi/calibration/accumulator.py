"""Running sums of rows and of their products, of which the moments of a reader's input are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from modhifi.calibration.moments import Moments, PairedMoments, Spanned

# A product of two numbers of these types is exact in single precision, in which it is added up.
EXACT_IN_SINGLE = (torch.bfloat16, torch.float16)
# Rows are held until they have so many elements, and are at least so many, or a run of batches ends, before their
# products are summed: adding to a wide Gram costs more than the product of few rows.
HELD_ELEMENTS, HELD_ROWS = 2**20, 1024
# Rather than wait for another process, a first batch holds so many times these.
PATIENT = 2
# Of a Gram of so many bytes, rows are held as long as they are at most half as many as its columns.
LARGE = 2**27


class Accumulator:
    """Sums ``x - shift`` and its products over all rows x; ``shift`` is the mean of the first rows.

    Products of float32 rows are float32 and sums over them float64: a mean that is large beside the deviations costs
    no digits. Rows of half precision have digits for no such mean; their products are made without a shift.
    Of the last ``targets`` columns only the squares, and the products with those before, are summed. ``expected`` is
    how many rows there will be, those of other processes included, None where that is not known. ``wait``, until it is
    None, is called before anything is summed: it calls :meth:`begin`.
    """

    def __init__(self, targets: int = 0) -> None:
        self.n, self.targets = 0, targets
        self.expected: int | None = None
        self.wait: Callable[[], None] | None = None
        self.shift: Tensor | None = None
        self.first: Tensor | None = None
        self.held: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Add r new rows, which are the columns of ``rows`` ``(G, d, r)`` and may not change afterwards."""
        if not rows.shape[2]:
            return
        self.n += rows.shape[2]
        if self.shift is None:
            exact = rows.dtype in EXACT_IN_SINGLE
            self.shift = rows.new_zeros(rows.shape[:2], dtype=torch.float32) if exact else rows.mean(2)
        self.held.append(rows)
        if self.wait is None:
            self._sum_many()
        elif self._rows_held > PATIENT * self._most:
            self.wait()

    def begin(self, shift: Tensor | None, expected: int | None) -> None:
        """Subtract this ``shift`` ``(G, d)`` from the first row on, and expect so many, where there is one."""
        self.wait = None
        if shift is not None:
            self.shift, self.expected = shift, expected
        if self.held:
            self._sum_many()

    @property
    def _rows_held(self) -> int:
        return sum(piece.shape[2] for piece in self.held)

    @property
    def _most(self) -> int:
        """So many rows are held at most."""
        groups, width = self.held[0].shape[:2]
        return width // 2 if self._stay_rows() else max(HELD_ROWS, HELD_ELEMENTS // (groups * width)) - 1

    def _sum_many(self) -> None:
        """Sum the products of the rows that are held if they are many."""
        if self._rows_held > self._most:
            self._sum()

    def settle(self) -> None:
        """Sum the products of the rows that are held, unless they are to stay rows: those to come go apart."""
        if self.held and self.wait is None and not self._stay_rows():
            self._sum()

    def _stay_rows(self) -> bool:
        """Whether a Gram is never made of the rows so far."""
        if self.first is not None or self.targets:
            return False
        groups, width = self.held[0].shape[:2]
        return few_rows_pay(groups, width) and (self.expected is None or self.expected <= width // 2)

    def state(self) -> dict[str, Tensor]:
        """All that the sums are, by name; with ``n`` and these, :meth:`restore` goes on to the bit."""
        sums = {} if self.shift is None else {"shift": self.shift}
        if self.first is not None:
            sums |= {"first": self.first, "second": self.second}
        if self.expected is not None:
            sums["expected"] = torch.tensor(self.expected)
        return sums | ({"held": torch.cat(self.held, 2)} if self.held else {})

    def restore(self, n: int, state: Mapping[str, Tensor]) -> None:
        """Become what another accumulator was with this ``state`` after ``n`` rows."""
        self.n, self.held = n, [state["held"]] if "held" in state else []
        self.shift = state.get("shift")
        self.expected = int(state["expected"]) if "expected" in state else None
        if "first" in state:
            self.first, self.second = state["first"], state["second"]

    def _sum(self) -> None:
        """Sum the products of the rows that are held."""
        rows = self.held[0] if len(self.held) == 1 else torch.cat(self.held, 2)
        self.held.clear()
        assert self.shift is not None
        self.shift = self.shift.to(rows.device)
        wide = torch.float64 if rows.device.type != "mps" else torch.float32
        groups, width = rows.shape[:2]
        inputs = width - self.targets
        if self.first is None:
            self.first = torch.zeros((groups, width), dtype=wide, device=rows.device)
            self.second = torch.zeros((groups, inputs, width), dtype=wide, device=rows.device)
            self.squares = torch.zeros((groups, self.targets), dtype=wide, device=rows.device)
        if rows.dtype not in EXACT_IN_SINGLE:
            rows = rows - self.shift[:, :, None]
        self.first += rows.sum(2, dtype=wide)
        if self.targets:
            self.squares += rows[:, inputs:].float().square().sum(2, dtype=wide)
        turned = rows.transpose(1, 2)
        # only the upper triangle, strip by strip: the product is symmetric
        for strip in _strips(inputs):
            self.second[:, strip, strip.start :].add_(_product(rows[:, strip], turned[:, :, strip.start :]))

    def finish(self) -> Moments:
        """The moments of everything added. Spends the sums, which become the result in place: Grams are large."""
        if self.held and self._stay_rows():
            return Spanned(torch.cat(self.held, 2))
        mean, second = self._finished()
        return Moments(self.n, mean, second)

    def finish_paired(self) -> PairedMoments:
        """The moments of everything added, targets apart; spends the sums as :meth:`finish` does."""
        mean, second = self._finished()
        inputs = second.shape[1]
        assert self.first is not None
        energy = self.squares.double() / self.n - (self.first.double() / self.n)[:, inputs:].square()
        cov, cross = second[:, :, :inputs], second[:, :, inputs:].mT
        return PairedMoments(self.n, mean[:, :inputs], cov, mean[:, inputs:], energy, cross)

    def _finished(self) -> tuple[Tensor, Tensor]:
        """The mean of all columns ``(G, d)``, and their covariance with the inputs among them ``(G, inputs, d)``."""
        if self.held:
            self._sum()
        assert self.shift is not None and self.first is not None
        first, second = self.first.double() / self.n, self.second.double()
        del self.second
        inputs = second.shape[1]
        second.baddbmm_(first[:, :inputs, None], first[:, None, :], beta=1 / self.n, alpha=-1)
        for strip in _strips(inputs):
            if strip.stop < inputs:
                second[:, strip.stop : inputs, strip] = second[:, strip, strip.stop : inputs].transpose(1, 2)
        return first + self.shift.double(), second


def few_rows_pay(groups: int, width: int) -> bool:
    """Whether a Gram is so large that few rows are kept in its place."""
    return groups * width**2 * 8 >= LARGE


def _strips(width: int) -> list[slice]:
    strip = max(1024, width // 4)
    return [slice(start, min(start + strip, width)) for start in range(0, width, strip)]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix products ``left right``, float32; on a GPU those of half precision are made as they are."""
    if left.dtype in EXACT_IN_SINGLE and left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    left, right = left.float(), right.float()
    if len(left) == 1 and left.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # MKL makes single products at half of what processors of another maker can do, oneDNN does not
        rows: Tensor = linear(left[0].to_mkldnn(), right[0].mT)
        return rows.to_dense()[None]
    return torch.bmm(left, right)
