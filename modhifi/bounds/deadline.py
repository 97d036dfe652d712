"""An allowance of processor time for what a run can do without."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


class OutOfTime(Exception):
    """The allowance is used up."""


class Deadline(TorchFunctionMode):
    """Inside, the next torch function after so many seconds of processor time raises :class:`OutOfTime`.

    Processor time, as other programs on the machine are no reason to leave anything out.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.process_time() + seconds

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.process_time() > self.end:
            raise OutOfTime
        return func(*args, **(kwargs or {}))
