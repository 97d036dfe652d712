"""``eager``: torch runs the model's own Python code, kernel by kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modhifi.artifacts.export import MainOutput
from modhifi.models.loaded import last_logits
from modhifi.runs.timing.runtimes.base import RUNTIMES, Program, Run, Runtime

if TYPE_CHECKING:
    from torch import Tensor, nn


def load(model: nn.Module, example: Tensor) -> Program:
    """The model as it is; its number of threads is whatever torch's is when it runs.

    A language model computes the logits of the last position alone, as where it writes.
    """
    import torch

    wrapped = MainOutput(model, **last_logits(model))

    def program(batch: Tensor, threads: int) -> Run:
        @torch.inference_mode()
        def run() -> Tensor:
            return wrapped(batch)

        return run

    return program


def operator(layer: Any, batch: Tensor, threads: int) -> Run:
    """The layer as it is."""
    import torch

    @torch.inference_mode()
    def run() -> Tensor:
        output: Tensor = layer(batch)
        return output

    return run


RUNTIMES.register(
    Runtime("eager", "torch, the model's own code kernel by kernel", "https://pytorch.org", load, operator)
)
