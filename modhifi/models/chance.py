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

    with torch.random.fork_rng(devices=[device] if gpu else []):
        content = batch.detach().cpu().contiguous().reshape(-1)
        torch.manual_seed(zlib.crc32(bytes(content.view(torch.uint8).numpy())))
        before = states()
        yield lambda: not all(map(torch.equal, before, states()))
