"""How to prune, and how a run tells of its progress."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PruneSettings:
    """How to prune.

    ``ridge`` is in units of a Gram's mean diagonal; ``rows_per_column`` bounds the rows a Gram looks at (None: every
    position); ``floor`` is the least share of a group that stays; with ``behind_norms``, ``obs`` orders removals by
    errors as they leave the BatchNorm behind a reader: better where a large share goes everywhere, not elsewhere.
    """

    selector: str = "obs"
    compensate: str = "lstsq"
    layout: str = "global"
    weighting: str = "amplification"
    sequential: str | None = None
    floor: float = 0.1
    round_to: int = 1
    ridge: float = 1e-4
    rows_per_column: int | None = 2
    eta: float | None = None
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    coupled: bool = True
    behind_norms: bool = False
    seed: int = 0
    batch_size: int = 32
