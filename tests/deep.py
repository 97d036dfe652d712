"""Small residual models in which blocks and sublayers can go, as the structure of each tells."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
import transformers
from tiny_transformers import FAMILIES, TIMM, livelier
from torch import Tensor, nn

from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.stages import find_structure
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan

DEPTH = 4
RESNET = dict(stem_width=4, stem_type="deep", channels=(8, 8, 12, 12), layers=(3, 2, 1, 1), zero_init_last=False)
SWIN = TIMM["swin_tiny_patch4_window7_224"] | dict(depths=(2, 4))
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet18", RESNET),
    "vit with scales": ("vit_tiny_patch16_224", TIMM["vit_tiny_patch16_224"] | dict(depth=DEPTH, init_values=0.5)),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "convnext": ("convnext_atto", dict(dims=(8, 8, 12, 12), depths=(1, 1, 3, 1), ls_init_value=0.5)),
}
TEXTS = ("llama", "gpt2")
NAMES = (*TEXTS, *IMAGES)


def deep(name: str, depth: int = DEPTH, **more: Any) -> LoadedModel:
    """A model of random weights in float32, lively enough that every block shows in its output."""
    torch.manual_seed(0)
    if name in IMAGES:
        architecture, args = IMAGES[name]
        model: nn.Module = timm.create_model(architecture, num_classes=5, **args).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.5)
        model.pretrained_cfg.update(input_size=(3, 32, 32), fixed_input_size=True, crop_pct=1.0)
    else:
        kind, config, fields = FAMILIES[name]
        layers = {"n_layer" if name == "gpt2" else "num_hidden_layers": depth}
        model = livelier(
            getattr(transformers, kind)(getattr(transformers, config)(**{**fields, **layers, **more})).eval()
        )
    return load_model(model.requires_grad_(False))


def inputs(loaded: LoadedModel, count: int, length: int = 12) -> Tensor:
    """Model-ready inputs, seeded."""
    generator = torch.Generator().manual_seed(1)
    if loaded.reads_tokens:
        return torch.randint(3, 50, (count, length), generator=generator)
    return torch.randn(count, *loaded.example.shape[1:], generator=generator)


@cache
def known(name: str) -> tuple[LoadedModel, Structure]:
    """A model that no test changes, and its structure."""
    loaded = deep(name)
    return loaded, find_structure(loaded, on_request=True)


def of_kind(structure: Structure, *kinds: str) -> Structure:
    """The structure in which groups of some kinds alone can be pruned."""
    return structure.select([g.name for g in structure.prunable if g.kind in kinds])


def plan_without(structure: Structure, choose: Callable[[int], list[int]] = lambda n: [n - 1]) -> Plan:
    """The plan that removes of every group the components that ``choose`` names, of so many: by default the last."""
    return Plan({g.name: tuple(sorted(set(range(g.n)) - set(choose(g.n)))) for g in structure.prunable if choose(g.n)})
