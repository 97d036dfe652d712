"""What a distillation runs on: accelerate's devices, precision and processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from modhifi.errors import ModhifiError


def accelerator_for(device: torch.device, precision: str) -> Accelerator:
    """The accelerator of this process; raises ModhifiError where accelerate is set up for something else in it."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    try:
        return Accelerator(mixed_precision=precision, cpu=device.type == "cpu", device_placement=False)
    except ValueError as error:
        raise ModhifiError(f"accelerate is set up otherwise in this process: {error}") from None
