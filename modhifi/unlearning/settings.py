"""How to forget: the settings of an edit and the defaults of a method."""

from __future__ import annotations

from dataclasses import dataclass

# The unit of a strength that blends between the original and the edit.
WHOLE = "share of the way to the full edit"


@dataclass(frozen=True)
class Defaults:
    """``depth`` blocks back from the head, ``passes`` over them, and the ``strength`` in the method's own unit."""

    depth: int
    passes: int
    strength: float
    unit: str


@dataclass(frozen=True)
class UnlearnSettings:
    """How to forget; None takes the method's own default.

    ``only``: shell patterns of operators to edit in place of those of the last ``depth`` blocks. Of erase-writers
    alone: ``exact`` makes the class means of the stream coincide, ``forget_weight`` is the forgotten samples' share of
    the pooled moments, ``class_weight`` how much more the means of the retained classes count than their samples.
    ``damping`` is in units of a moment matrix's mean diagonal.
    """

    method: str = "erase-writers"
    depth: int | None = None
    passes: int | None = None
    strength: float | None = None
    only: tuple[str, ...] = ()
    exact: bool = True
    forget_weight: float = 0.1
    class_weight: float = 10.0
    damping: float = 1e-3
    settle: bool = True
    batch_size: int = 64

    def filled(self, own: Defaults) -> Defaults:
        """Depth, passes and strength that apply, given the method's ``own``."""
        return Defaults(
            own.depth if self.depth is None else self.depth,
            own.passes if self.passes is None else self.passes,
            own.strength if self.strength is None else self.strength,
            own.unit,
        )
