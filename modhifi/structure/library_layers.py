"""Layers of timm and transformers, told apart by name: importing either library takes seconds."""

from __future__ import annotations

from torch import nn

SAME_PADDED = "timm.layers.conv2d_same.Conv2dSame"
TRANSPOSED = "transformers.pytorch_utils.Conv1D"


def full_name(kind: type) -> str:
    """The name of a class with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_same_padded(module: nn.Module) -> bool:
    """Whether a module is timm's ``Conv2dSame``: a convolution that pads its input by its size."""
    return any(full_name(kind) == SAME_PADDED for kind in type(module).__mro__)


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of buffers alone, as the backbones of detectors have them."""
    return "FrozenBatchNorm" in type(module).__name__ and {"weight", "bias", "running_mean", "running_var"} <= {
        name for name, _ in module.named_buffers(recurse=False)
    }


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, the linear layer of GPT-2, whose weight is (in, out)."""
    return any(full_name(kind) == TRANSPOSED for kind in type(module).__mro__)
