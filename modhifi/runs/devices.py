"""The device of a run."""

from __future__ import annotations

import torch

from modhifi.errors import ModhifiError


def resolve_device(name: str | torch.device) -> torch.device:
    """The device called ``name``, where ``auto`` is cuda if it is available and cpu if not.

    Raises ModhifiError if the device is not available.
    """
    known = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = "cuda" if known["cuda"] else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not known.get(device.type, False) or (device.index or 0) >= _count(device.type):
        raise ModhifiError(f"the device {str(name)!r} is not available here; use --device auto or --device cpu")
    return device


def _count(kind: str) -> int:
    return max(1, torch.cuda.device_count()) if kind == "cuda" else 1
