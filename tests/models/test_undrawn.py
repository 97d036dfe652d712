"""Parameters whose random numbers nobody reads are not drawn."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_text
import tiny_timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modhifi.models.load import load_model
from modhifi.models.skeleton import build_skeleton, own_config
from modhifi.models.undrawn import Undrawn


class Draws(TorchDispatchMode):
    """Counts what is drawn on the CPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("normal_", "uniform_") and args[0].device.type == "cpu":
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [tiny_text.llama, tiny_timm.vit])
def test_a_skeleton_on_the_cpu_draws_nothing(make: Any) -> None:
    loaded = load_model(make())
    with Draws() as draws:
        skeleton = build_skeleton(loaded.framework, loaded.info, own_config(loaded.model))
    assert draws.count == 0
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in loaded.model.named_parameters()
    }


def test_parameters_keep_their_memory_and_all_else_is_drawn() -> None:
    with Undrawn():
        layer = nn.Linear(3, 4)
        kept = layer.weight.detach().clone()
        nn.init.xavier_normal_(layer.weight)
        nn.init.constant_(layer.bias, 2.0)
        drawn = torch.empty(1000).normal_()
    torch.testing.assert_close(layer.weight.detach(), kept, equal_nan=True)
    assert (layer.bias == 2).all() and 0.9 < float(drawn.std()) < 1.1
