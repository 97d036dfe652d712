"""Runs compute as they do by themselves, whatever modes of torch their caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_modes() -> Iterator[None]:
    """Inside, neither inference mode nor autocast is on.

    Tensors that are made in inference mode can never be trained, and products that autocast takes in half precision are
    no moments.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
