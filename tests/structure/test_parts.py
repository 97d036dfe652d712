"""The mask oracle of models that read sounds, series or several inputs: all groups at once, every output."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import tiny_parts
import torch
from torch import Tensor, nn

from modhifi.models.load import load_model
from modhifi.structure.outputs import difference
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import confirm

HEADLESS = ("t5",)  # its table of relative positions holds a column for every head


@pytest.mark.parametrize("name", tiny_parts.MODELS)
@torch.no_grad()
def test_oracle(name: str) -> None:
    model = tiny_parts.model(name).double()
    loaded = load_model(model)

    def run(model: nn.Module) -> Mapping[str, Tensor]:
        return loaded.outputs(loaded.example, model)

    structure = confirm(loaded.model, trace(loaded.model, run), run)
    kinds = {group.kind for group in structure.prunable}
    assert kinds >= ({"neurons"} if name in HEADLESS else {"neurons", "heads"})
    plan = Plan({group.name: tuple(range(0, group.n, 2)) for group in structure.prunable if group.partition is None})
    masked, dense = run(mask_readers(loaded.model, structure, plan)), run(loaded.model)
    small = run(shrink(loaded.model, structure, plan))
    assert any(difference(masked[key], dense[key]) > 1e-6 for key in dense)
    assert {key: difference(small[key], masked[key]) <= 1e-9 for key in dense} == dict.fromkeys(dense, True)
