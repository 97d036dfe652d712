"""A few processes of one run, forked from the test's own so that they start at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from modhifi.calibration.distributed import Processes


def in_team(count: int, where: Path, run: Callable[[Processes], Any], seconds: float = 60) -> list[Any]:
    """What ``run`` returns in each of ``count`` gloo processes, or the exception it raises, None where one ended.

    A process waits ``seconds`` for the others; ``where`` is an empty folder.
    """

    def child(index: int) -> None:
        torch.set_num_threads(1)  # what OpenMP knows of threads does not outlive a fork
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{where / 'store'}",
            rank=index,
            world_size=count,
            timeout=timedelta(seconds=seconds),
        )
        try:
            result = run(Processes(index, count))
        except Exception as error:
            result = error
        torch.save(result, where / f"{index}.pt")

    forked = multiprocessing.get_context("fork")
    children = [forked.Process(target=child, args=(index,)) for index in range(count)]
    for process in children:
        process.start()
    for process in children:
        process.join()
    files = [where / f"{index}.pt" for index in range(count)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]
