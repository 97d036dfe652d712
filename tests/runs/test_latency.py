from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.runs import latency
from modhifi.runs.latency import compare_latency

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def linear(seed: int, inputs: int = 6, outputs: int = 4) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).eval().requires_grad_(False)


@pytest.mark.parametrize("device", DEVICES)
def test_latency_is_measured_in_turns(device: str) -> None:
    calls: list[str] = []

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.name)
            return super().forward(x)

    models = {name: Noting(4, 4).to(device) for name in ("dense", "edited")}
    for name, model in models.items():
        model.name = name
    result = compare_latency(models, torch.randn(3, 4), rounds=4, min_run_time=1e-4)
    dense, edited = result["dense"], result["edited"]
    assert dense.ratio == 1 and dense.ratio_iqr == 0
    assert dense.median > 0 and edited.median > 0 and edited.iqr >= 0 and edited.ratio > 0
    assert (edited.rounds, edited.batch, edited.threads) == (4, 3, torch.get_num_threads())
    assert edited.device.startswith(device)
    assert set(asdict(edited)) >= {"median", "iqr", "ratio"}
    # Every round ends where the next begins: dense edited | edited dense | dense edited | edited dense.
    turns = [name for name, following in zip(calls, [*calls[1:], ""], strict=True) if name != following]
    assert turns[-5:] == ["dense", "edited", "dense", "edited", "dense"]


def test_latency_takes_the_ratio_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine slows down from round to round; the edited model takes half the dense model's time throughout.
    # Before the rounds one pass warms up and one tells how many passes a round takes.
    slowness = {"dense": iter([9.0, 0.005, 1, 2, 3, 4, 5]), "edited": iter([9.0, 0.005, 0.5, 1, 1.5, 2, 2.5])}

    class Scripted:
        def __init__(self, _: str, globals: dict[str, nn.Linear], num_threads: int) -> None:
            self.name = "dense" if globals["model"].out_features == 4 else "edited"

        def timeit(self, number: int) -> SimpleNamespace:
            return SimpleNamespace(mean=next(slowness[self.name]))

    monkeypatch.setattr(latency, "_timer", lambda: Scripted)
    result = compare_latency({"dense": linear(0), "edited": linear(0, outputs=2)}, torch.zeros(1, 6), rounds=5)
    assert (result["dense"].median, result["dense"].iqr) == (3, 2)
    assert (result["edited"].median, result["edited"].iqr) == (1.5, 1)
    assert (result["edited"].ratio, result["edited"].ratio_iqr, result["edited"].passes) == (0.5, 0, 10)


def test_latency_refuses_models_on_two_devices() -> None:
    with pytest.raises(ModhifiError, match="same"):
        compare_latency({"a": linear(0), "b": linear(0).to("meta")}, torch.randn(1, 6))
