"""Models that draw random numbers as they run, as masked autoencoders do: the same ones for the same batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def drawing_by(batch: Tensor, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Inside, torch draws the random numbers that belong to the ``batch``; behind it all are as they were.

    Gives a function that says whether any were drawn so far, on the CPU or on ``device``.
    """
    gpu = device.type == "cuda"

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if gpu else [])]

    def drawn() -> bool:
        with torch._C.DisableTorchFunction():
            return not all(map(torch.equal, before, states()))

    with torch.random.fork_rng(devices=[device] if gpu else []):
        # A mode that watches the model is to see nothing of this.
        with torch._C.DisableTorchFunction():
            torch.manual_seed(_number(batch))
            before = states()
        yield drawn


def _number(batch: Tensor) -> int:
    """A number that the content of a batch makes; 0 for one that has none, as in a pass for its shapes alone."""
    try:
        content = batch.detach().cpu().contiguous().reshape(-1)
        return zlib.crc32(bytes(content.view(torch.uint8).numpy()))
    except (RuntimeError, NotImplementedError):
        return 0
