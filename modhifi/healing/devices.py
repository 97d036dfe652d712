"""What a distillation runs on: accelerate's devices, precision and processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized

from modhifi.errors import ModhifiError
from modhifi.models.half_precision import has_bfloat16


@contextmanager
def accelerator_for(device: torch.device, precision: str) -> Iterator[Accelerator]:
    """The accelerator of this process, which has one precision while there is any: "auto" takes the one that it has.

    Without one before, there is none behind either. Raises ModhifiError where accelerate is set up for something else.
    """
    own = not is_initialized()
    wanted: str | None = precision
    if precision == "auto":
        wanted = ("bf16" if has_bfloat16(device) else "no") if own else None
    try:
        try:
            accelerator = Accelerator(mixed_precision=wanted, cpu=device.type == "cpu", device_placement=False)
        except ValueError as error:
            raise ModhifiError(f"accelerate is set up otherwise in this process: {error}") from None
        yield accelerator
    finally:
        if own:
            AcceleratorState._reset_state()
