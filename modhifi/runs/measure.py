"""The size of a model: parameters, operations and bytes. Every figure is measured, none is estimated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modhifi.structure.flops import counting


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


Forward = Callable[[nn.Module, Tensor], object]
"""One forward pass of a model on a batch."""


def plainly(model: nn.Module, batch: Tensor) -> object:
    """The forward pass of a model that takes a batch and nothing else."""
    return model(batch)


@torch.no_grad()
def count_flops(model: nn.Module, batch: Tensor, forward: Forward = plainly) -> int:
    """The floating-point operations of one forward pass of the first item of ``batch``.

    A multiply-add counts as two operations. Counted are matrix products, convolutions, recurrent layers and attention
    (in full, also where a causal mask would allow to skip half of it); norms, activations and pooling are not.
    """
    with counting() as counter:
        forward(model, batch[:1].to(device_of(model)))
    return counter.total


def stored_bytes(model: nn.Module) -> int:
    """The bytes of a model's state dict as it is written, shared tensors once."""
    sizes = {(t.data_ptr(), t.dtype, tuple(t.shape)): t.nbytes for t in model.state_dict().values()}
    return sum(sizes.values())


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters: the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
