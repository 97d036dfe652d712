"""The errors that a user can meet; each carries the exit code of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable


class ModhifiError(Exception):
    """Bad usage or input: one line that says what is wrong and what to do. Exit code 2."""

    exit_code = 2


class OutOfReach(ModhifiError):
    """No edit of this model meets the budget."""


class GateFailed(ModhifiError):
    """A check or a tolerance failed or stayed inconclusive. Exit code 1."""

    exit_code = 1


class SelfTestFailed(ModhifiError):
    """A bound was violated on the very samples it was computed from: a bug of modhifi. Exit code 3."""

    exit_code = 3


class IndefiniteError(ModhifiError):
    """A Gram matrix that no damping makes positive definite; ``groups`` are those that need it, as far as known."""

    def __init__(self, groups: Iterable[str] = ()) -> None:
        self.groups = tuple(groups)
        needed = f", which the group '{self.groups[0]}' needs," if self.groups else ""
        super().__init__(
            f"a Gram matrix{needed} is not positive definite even with strong damping; use more calibration samples"
        )


class UnfollowedError(ModhifiError):
    """A model whose code does not follow the cut of some ``groups``: what is left computes something else."""

    def __init__(self, groups: Iterable[str]) -> None:
        self.groups = tuple(groups)
        super().__init__(
            f"once {', '.join(self.groups[:3])} {'is' if len(self.groups) == 1 else 'are'} cut, the model computes "
            "something else on the samples than with the components masked, or fails: its code counts on them, or "
            "takes a branch there; --exclude them"
        )


# What torch's own allocator says, and oneDNN where it gets no room for its scratch pad.
OUT_OF_MEMORY = re.compile("can't allocate memory|could not create a primitive$")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is too small, of a GPU or of the CPU.

    It goes by names and words: importing torch for its class would slow every command down.
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None)
