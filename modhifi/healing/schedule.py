"""How much of a distillation is done, by steps or by time, and the learning rate there."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

# The share of a run over which the learning rate rises; the number of intervals after which it is looked at and saved.
WARM_UP, INTERVALS = 0.05, 20


@dataclass
class Schedule:
    """The end of a run after ``steps`` or ``minutes``, whichever comes first; ``spent`` seconds lie behind it."""

    steps: int | None
    minutes: float | None
    spent: float = 0.0
    start: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """The time that the run has taken, earlier parts of it included."""
        return self.spent + time.monotonic() - self.start

    def share(self, step: int) -> float:
        """The share that is done after ``step`` steps, in [0, 1]."""
        by_steps = step / self.steps if self.steps is not None else 0.0
        by_time = self.seconds / (60 * self.minutes) if self.minutes is not None else 0.0
        return min(1.0, max(by_steps, by_time))


def learning_rate(share: float) -> float:
    """The learning rate over its largest value: a linear rise, then a cosine (Loshchilov and Hutter 2017)."""
    if share < WARM_UP:
        return (share + WARM_UP / 10) / (1.1 * WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def interval(share: float) -> int:
    """The number of finished intervals."""
    return math.floor(INTERVALS * share + 1e-9)  # a third of three thirds may be a little less than one
