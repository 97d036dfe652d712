"""Tiny timm networks of five classes with random weights, one for each kind of residual branch."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from modhifi.data.samples import Samples


def _tiny(name: str, size: int, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, img_size=size, **arguments)


def swin() -> nn.Module:
    return _tiny("swin_tiny_patch4_window7_224", 56, depths=(2, 2), embed_dim=16, num_heads=(2, 2), window_size=7)


def vit() -> nn.Module:
    return _tiny("vit_tiny_patch16_224", 48, depth=2, embed_dim=16, num_heads=2)


def convnext() -> nn.Module:
    torch.manual_seed(0)
    shape = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    return timm.create_model("convnext_atto", num_classes=5, ls_init_value=0.5, **shape)


def resnet(**arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=5, channels=(8, 12, 16, 16), stem_width=8, **arguments)


def linear_resnet() -> nn.Module:
    """Nothing between the additions and what reads them, so that a stream is linear in its writers."""
    return resnet(act_layer=nn.Identity)


def samples_of(inputs: Tensor, labels: Tensor) -> Samples:
    names = tuple(str(i) for i in range(len(inputs)))
    return Samples(lambda i: inputs[i], names, labels, names, "random", False)
