"""Where matrix products and convolutions in bfloat16 are faster than in float32."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

# What `torch.cpu.get_capabilities` calls instructions for products in bfloat16, on x86 and on ARM.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16; False for a CPU where torch cannot tell."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # absent from older torch
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name, False) for name in INSTRUCTIONS)


def takes_bfloat16(model: nn.Module) -> bool:
    """Whether products of a model can be made in it: beside float16 weights many operators take no other half."""
    return all(parameter.dtype != torch.float16 for parameter in model.parameters())


def in_bfloat16(model: nn.Module) -> AbstractContextManager[Any]:
    """The context in which a model's products are made in bfloat16, where it and its device take that."""
    device = next(model.parameters()).device
    taken = has_bfloat16(device) and takes_bfloat16(model)
    return torch.autocast(device.type, torch.bfloat16) if taken else nullcontext()
