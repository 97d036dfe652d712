"""The device of a run."""

from __future__ import annotations

import torch

from modhifi.errors import ModhifiError


def resolve_device(name: str) -> torch.device:
    """The device called ``name``, where ``auto`` is cuda if it is available and cpu if not.

    Raises ModhifiError if the device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available.get(name, False):
        raise ModhifiError(f"the device {name!r} is not available here; use --device auto or --device cpu")
    return torch.device(name)
