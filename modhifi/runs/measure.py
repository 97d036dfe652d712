"""What a model costs: parameters, operations, bytes and memory. Every figure is measured, none is estimated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from modhifi.structure.flops import counting

T = TypeVar("T")


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_flops(model: nn.Module, batch: Tensor) -> int:
    """Floating-point operations of one forward pass of the first item of ``batch``.

    A multiply-add counts as two operations. Counted are matrix products, convolutions, recurrent layers and attention
    (in full, also where a causal mask would allow to skip half of it); norms, activations and pooling are not.
    """
    with counting() as counter:
        model(batch[:1].to(device_of(model)))
    return counter.total


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's state dict as it is written, shared tensors once."""
    seen = {(t.data_ptr(), t.dtype, tuple(t.shape)): t.nbytes for t in model.state_dict().values()}
    return sum(seen.values())


def with_peak_memory(run: Callable[[], T], device: torch.device | str = "cpu") -> tuple[T, int]:
    """Call ``run`` and return its result and the peak of memory meanwhile, in bytes.

    On cuda: what torch allocated. Elsewhere: the resident memory of the whole process, libraries included; the peak of
    this call on Linux, where it can be reset, the peak since the process began on other systems.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device)
    _reset_peak_resident()
    return run(), _peak_resident()


def _reset_peak_resident() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak_resident() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        # Not at the top: Windows has no such module.
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters lie: the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
