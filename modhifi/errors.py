"""The errors that a user can meet; each carries the exit code of the command line."""

from __future__ import annotations


class ModhifiError(Exception):
    """Bad usage or input: one line that says what is wrong and what to do. Exit code 2."""

    exit_code = 2


class GateFailed(ModhifiError):
    """A check or a tolerance failed or stayed inconclusive. Exit code 1."""

    exit_code = 1


class SelfTestFailed(ModhifiError):
    """A bound was violated on the very samples it was computed from: a bug of modhifi. Exit code 3."""

    exit_code = 3


class IndefiniteError(ModhifiError):
    """A Gram matrix is not positive definite, whatever the damping. Exit code 2."""

    def __init__(self) -> None:
        super().__init__(
            "a Gram matrix is not positive definite even with strong damping; "
            "use more calibration samples, or check them for NaN"
        )
