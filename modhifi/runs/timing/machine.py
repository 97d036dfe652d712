"""The name of a device, as far as times depend on it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

# What a GPU's tensor cores and a CPU's vectors take at once, in bytes of one channel (NVIDIA, "Matrix Multiplication
# Background": dimensions that are multiples of 128 bytes).
GPU_BYTES, CPU_BYTES = 128, {"AVX512": 64}
OTHER_CPU_BYTES = 32


def channels_at_once(device: torch.device, dtype: torch.dtype) -> int:
    """How many channels a device's kernels take at a time: widths in between take as long as the next multiple."""
    cpu = CPU_BYTES.get(torch.backends.cpu.get_cpu_capability(), OTHER_CPU_BYTES)
    return max(1, (cpu if device.type == "cpu" else GPU_BYTES) // dtype.itemsize)


def device_name(device: torch.device | str) -> str:
    """The model of a GPU or, of a CPU, its model, vector instructions and architecture."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} {platform.machine()}"
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}, {platform.machine()})"


def _processor() -> str:
    """The CPU's model as Linux tells it, elsewhere what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "CPU")
