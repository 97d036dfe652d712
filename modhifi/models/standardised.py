"""Layers that standardise their weight in every pass, made plain: afterwards their inputs can be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modhifi.structure.library_layers import full_name
from modhifi.structure.torch_ops import names_of, operation_name

# Convolutions whose weight is brought to mean 0 and variance 1 for each output (Qiao et al., arXiv:1903.10520).
STANDARDISED = frozenset(
    {
        *(f"timm.layers.std_conv.{name}" for name in ("StdConv2d", "StdConv2dSame")),
        *(f"timm.layers.std_conv.{name}" for name in ("ScaledStdConv2d", "ScaledStdConv2dSame")),
        "transformers.models.bit.modeling_bit.WeightStandardizedConv2d",
    }
)


class _WeightOf(TorchFunctionMode):
    """Keeps the weight that a convolution is run with."""

    weight: Tensor

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation_name(func) in names_of("conv"):
            self.weight = args[1]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def with_plain_weights(model: nn.Module) -> nn.Module:
    """The model, whose standardised convolutions are plain ones of the weight that they compute, in place.

    A standardised weight depends on all of its inputs: without some of them, the others would count more.
    """
    layers = [module for module in model.modules() if full_name(type(module)) in STANDARDISED]
    for layer in layers:
        weight = _computed_weight(layer)
        padded = getattr(layer, "same_pad", False) or getattr(layer, "pad", None) is not None
        layer.__class__ = _same_padded() if padded else nn.Conv2d
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if hasattr(layer, "gain"):
            del layer.gain
    return model


def _computed_weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    shape = (1, int(layer.in_channels), *weight.shape[2:])  # type: ignore[arg-type]
    dilation = max(layer.dilation)  # type: ignore[arg-type]
    image = torch.zeros(shape, dtype=weight.dtype, device=weight.device).repeat(1, 1, dilation, dilation)
    with _WeightOf() as computed:
        layer(image)
    return computed.weight.clone()


def _same_padded() -> type[nn.Module]:
    from timm.layers import Conv2dSame  # timm takes seconds, which models without such layers do without

    return Conv2dSame
