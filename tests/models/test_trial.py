from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import modhifi
from modhifi.errors import GateFailed, ModhifiError
from modhifi.models.load import load_model
from modhifi.models.trial import try_pass, unrepeatable
from modhifi.pruning.stages import find_structure


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
        if self.kind == "dropped input":
            x = F.dropout(x, 0.5, training=True)
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
    "second output": "module:Drifting draws at random as it runs: figures hold for one draw a batch",
    "dropped input": "module:Drifting draws at random as it runs: figures hold for one draw a batch",
    "dropout": "module:Drifting draws at random as it runs: figures hold for one draw a batch",
}


@pytest.mark.parametrize("kind", [*CAUSES, "steady"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_passes_that_differ_are_told_and_leave_the_model_as_it_was(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    loaded = load_model(Drifting(kind).to(dtype), example=torch.randn(2, 6, dtype=dtype))
    told = unrepeatable(loaded, loaded.example)
    assert (told or "").startswith(CAUSES[kind]) if kind in CAUSES else told is None
    assert float(loaded.model.passes) == 0


def test_a_buffer_that_grows_is_put_back() -> None:
    class Growing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 3)
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, x.mean()[None]])
            return super().forward(x) + self.seen.sum()

    x = torch.randn(2, 6)
    loaded = load_model(Growing(), example=x)
    assert "its buffer 'seen' changes" in str(unrepeatable(loaded, x)) and len(loaded.model.seen) == 0


def test_a_cause_that_no_buffer_shows() -> None:
    class Noise(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + random.random()

    x = torch.randn(2, 6)
    told = unrepeatable(load_model(Noise(6, 3), example=x), x)
    assert told is not None and "it keeps something from pass to pass, or draws at random" in told


@pytest.mark.parametrize("kind", ["steady", "buffer", "dropped input"])
def test_nothing_is_certified_where_passes_differ(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Drifting(kind), torch.randn(64, 6)
    # An error that every input of the box keeps to, were there no drift.
    checks = {"walked": 4, "max_error": 1e9}
    result = modhifi.prune(model, x, ratio=0.5, samples=32, checks=checks)
    verdicts = {v["name"]: v["verdict"] for v in result.report["verdicts"]}
    assert result.bounds is not None
    if kind == "steady":
        assert verdicts["R4 measured"] != "not available" and not any(
            "figures hold" in w for w in result.report["warnings"]
        )
        return
    warnings = [w for w in result.report["warnings"] if "figures hold for one" in w]
    assert warnings == [unrepeatable(load_model(model, example=x[:2]), x[:2])]
    certified = ("R1 theorem form", "R1 every input", "R2 certified-local", "R4 measured")
    assert {name: verdicts[name] for name in certified} == dict.fromkeys(certified, "not available")
    assert verdicts["max error 1e+09"] == "INCONCLUSIVE"
    with pytest.raises(GateFailed, match="its buffer 'passes' changes at every pass|draws at random as it runs"):
        result.bounds.enforce()
    assert verdicts["self-test"] == "not measured"


class Choosy(nn.Module):
    """Takes windows of at least five."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 5:
            raise IndexError(f"a window of {x.shape[1]} is shorter than 5\nand more")
        return self.down(self.up(x).relu()).mean(1)


def test_a_model_that_fails_on_the_data_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*args: object, **options: object) -> None:
        raise AssertionError("moments are collected")

    monkeypatch.setattr("modhifi.pruning.prune.measure_moments", measured)
    short, wide = torch.randn(16, 3, 6), torch.randn(16, 5, 6)
    told = (
        r"module:Choosy fails on a batch of \(2, 3, 6\) float32: IndexError: a window of 3 is shorter than 5; "
        "give items of the shape and type that its forward takes$"
    )
    with pytest.raises(ModhifiError, match=told):
        modhifi.prune(load_model(Choosy(), example=wide[:2]), short, ratio=0.5)
    told = "does not run on its example alone .a window of 3 is shorter than 5.; its forward takes x: "
    loaded = load_model(Choosy(), example=short[:2])
    with pytest.raises(ModhifiError, match=told):
        modhifi.prune(loaded, wide, ratio=0.5)
    with pytest.raises(ModhifiError, match=told):
        find_structure(loaded)


def test_what_is_no_fault_of_the_model_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    x = torch.randn(2, 6)
    with pytest.raises(RuntimeError, match="can't allocate"):
        try_pass(load_model(Full(6, 3), example=x), x)

    def trace(*args: object) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr("modhifi.pruning.stages.trace", trace)
    with pytest.raises(KeyError, match="of ours"):
        find_structure(load_model(Choosy(), example=torch.randn(2, 5, 6)))


def test_a_model_whose_cache_cannot_be_filled_is_pruned_without_it_and_does_not_write() -> None:
    torch.manual_seed(0)
    # Its queries are half as wide as its values, which its own cache does not know.
    narrow = {"hidden_size": 32, "num_hidden_layers": 1, "num_blocks": 1, "num_heads": 4, "vocab_size": 50}
    model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**narrow)).eval()
    given = {"ratio": 0.5, "samples": 8, "checks": {"walked": 0}}
    result = modhifi.prune(model, torch.randint(50, (16, 16)), **given)
    assert result.report["size"]["flops"][0] > result.report["size"]["flops"][1] > 0
    with pytest.raises(ModhifiError, match="matC_old has wrong shape.*; give text with --data text:FILE"):
        modhifi.prune(model, "self", window=16, **given)
