"""``compile``: torch.compile, which fuses what is elementwise and needs a C++ compiler on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modhifi.artifacts.export import MainOutput
from modhifi.models.hub import explained
from modhifi.models.loaded import last_logits
from modhifi.runs.timing.runtimes.base import RUNTIMES, Program, Run, Runtime
from modhifi.runs.timing.runtimes.eager import operator

if TYPE_CHECKING:
    from torch import Tensor, nn


# Every model and batch is compiled anew, and torch counts them all against one function.
MOST_COMPILATIONS = 256


def load(model: nn.Module, example: Tensor) -> Program:
    """Compiles for every batch and number of threads anew: both are written into the code."""
    import torch

    wrapped = MainOutput(model, **last_logits(model))

    def program(batch: Tensor, threads: int) -> Run:
        compiled = torch.compile(wrapped, dynamic=False)
        limits = torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS, fail_on_recompile_limit_hit=True)

        @torch.inference_mode()
        def run() -> Tensor:
            return compiled(batch)

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with explained("torch.compile"), limits:
                run()
        finally:
            torch.set_num_threads(before)
        return run

    return program


RUNTIMES.register(Runtime("compile", "torch.compile, which fuses kernels", "https://pytorch.org", load, operator))
