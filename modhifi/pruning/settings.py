"""The settings of a pruning run."""

from __future__ import annotations

from dataclasses import dataclass

from modhifi.calibration.sampling import Sampling
from modhifi.pruning.layouts.base import EXACT, Rounding


@dataclass(frozen=True)
class PruneSettings:
    """How to prune.

    ``experts`` orders whole experts where these go. ``ridge`` is in units of a Gram's mean diagonal;
    ``rows_per_column`` bounds the rows a Gram looks at (None: every position); ``floor`` is the least share of a group
    that stays, ``rounding`` what widths are multiples of; with ``behind_norms``, ``obs`` orders removals by errors as
    they leave the BatchNorm behind a reader: better where a large share goes everywhere, not elsewhere; ``strict``
    makes a group that cannot be measured or solved an error.
    """

    selector: str = "obs"
    compensate: str = "lstsq"
    experts: str = "removal"
    layout: str = "global"
    weighting: str = "amplification"
    sequential: str | None = None
    floor: float = 0.1
    rounding: Rounding = EXACT
    ridge: float = 1e-4
    rows_per_column: int | None = 2
    eta: float | None = None
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    coupled: bool = True
    behind_norms: bool = False
    strict: bool = False
    seed: int = 0
    batch_size: int = 32

    @property
    def sampling(self) -> Sampling:
        """Which samples and positions the moments are taken from."""
        return Sampling(self.rows_per_column, self.batch_size, self.seed)
