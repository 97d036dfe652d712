from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modhifi
from modhifi.models.load import load_model
from modhifi.models.repeatable import unrepeatable


class Drifting(nn.Module):
    """Two linear maps, scaled by what ``kind`` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 4)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.passes += 1
        x = self.up(x).relu()
        if self.kind == "dropout":
            x = F.dropout(x, 0.5)  # active in eval mode, too
        out = self.down(x)
        if self.kind == "buffer":
            out = out * self.passes
        if self.kind == "counter":
            out = out + self.calls
        return (out, out + 10 * torch.randn(())) if self.kind == "second output" else out


CAUSES = {
    "buffer": "two passes of module:Drifting on one batch differ: its buffer 'passes' changes at every pass",
    "counter": "two passes of module:Drifting on one batch differ: its buffer 'passes' changes at every pass",
    "second output": "two passes of module:Drifting on one batch differ in output '1': its buffer 'passes' changes",
    "dropout": "two passes of module:Drifting on one batch differ: its buffer 'passes' changes at every pass",
}


@pytest.mark.parametrize("kind", [*CAUSES, "steady"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_passes_that_differ_are_told_and_leave_the_model_as_it_was(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    loaded = load_model(Drifting(kind).to(dtype), example=torch.randn(2, 6, dtype=dtype))
    told = unrepeatable(loaded)
    assert (told or "").startswith(CAUSES[kind]) if kind in CAUSES else told is None
    assert float(loaded.model.passes) == 0


def test_a_cause_that_no_buffer_shows() -> None:
    class Noise(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(())

    told = unrepeatable(load_model(Noise(6, 3), example=torch.randn(2, 6)))
    assert told is not None and "it draws at random, or keeps something from pass to pass" in told


@pytest.mark.parametrize("kind", ["steady", "buffer"])
def test_nothing_is_certified_where_passes_differ(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Drifting(kind), torch.randn(64, 6)
    # An error that every input of the box keeps to, were there no drift.
    checks = {"walked": 4, "max_error": 1e9}
    result = modhifi.prune(model, x, ratio=0.5, samples=32, checks=checks)
    verdicts = {v["name"]: v["verdict"] for v in result.report["verdicts"]}
    assert result.bounds is not None
    if kind == "steady":
        assert verdicts["R4 measured"] != "not available" and not any("differ" in w for w in result.report["warnings"])
        return
    assert [w for w in result.report["warnings"] if "differ" in w] == [unrepeatable(load_model(model, example=x[:2]))]
    certified = ("R1 theorem form", "R1 every input", "R2 certified-local", "R4 measured")
    assert {name: verdicts[name] for name in certified} == dict.fromkeys(certified, "not available")
    assert verdicts["max error 1e+09"] != "PASS-CERTIFIED"
    assert verdicts["self-test"] == "not measured"
