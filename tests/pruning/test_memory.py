"""What a run takes is known before it starts, and a layer of many columns and few rows does not need its Gram."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from modhifi.calibration import memory
from modhifi.calibration.memory import check_room, gram_bytes, moment_bytes, place_to_remember, rows_seen
from modhifi.calibration.sampling import LEAST_ROWS, Sampling
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.pruning.stages import find_structure

VGG = Path(__file__).resolve().parents[2] / "eval" / "models" / "vgg"
PEAK = """
import resource, sys
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.runs.steady_memory import steady_memory
loaded = load_model(sys.argv[1])
samples = load_samples("synthetic", loaded, n=64, balanced=False)
with steady_memory():  # as in a run
    pruned = prune_model(loaded, samples, Budget("macs", 0.5), PruneSettings(weighting="energy"))
assert max(quality.width for quality in pruned.grams) == 25088
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(not VGG.is_dir() or sys.platform != "linux", reason="eval/models/vgg is not there")
def test_a_reader_of_25088_columns_takes_less_than_3_gib() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", PEAK, str(VGG)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert int(printed.split()[-1]) < 3 * 2**20


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4)).eval()


@pytest.mark.parametrize("together, free, refused", [(True, 1.0, True), (False, 1.0, False), (True, 2.0, False)])
def test_a_run_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, together: bool, free: float, refused: bool
) -> None:
    """Four times the largest Gram is free: enough for one reader at a time, not for all of them."""
    model = load_model(two_layers(), example=torch.randn(2, 6))
    structure = find_structure(model)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free * 4 * 8 * 40**2))
    if refused:
        with pytest.raises(ModhifiError, match="all 2 readers together"):
            check_room(model.model, structure, 100, Sampling(), together)
    else:
        check_room(model.model, structure, 100, Sampling(), together)


def test_moments_of_few_rows_take_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, linear = nn.Conv2d(8, 4, 3), nn.Linear(40, 4)
    macs = 49 * conv.weight.numel()
    assert rows_seen(conv, macs, 10, Sampling(None)) == 490
    assert rows_seen(conv, macs, 1000, Sampling(2)) == LEAST_ROWS
    assert moment_bytes(linear, 20) == gram_bytes(linear)
    monkeypatch.setattr("modhifi.calibration.accumulator.LARGE", 0)
    assert moment_bytes(linear, 20) == 20 * 40 * 4
    assert moment_bytes(linear, 21) == gram_bytes(linear)


def test_activations_are_remembered_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"cpu": 4000, "cuda": 400}
    monkeypatch.setattr(memory, "free_bytes", lambda device: sizes[device.type])
    assert place_to_remember(torch.device("cpu"), 1e9) == (None, 2000)
    assert place_to_remember(torch.device("cpu"), 1e9, processes=4) == (None, 500)
    assert place_to_remember(torch.device("cuda"), 100) == (None, 100)
    assert place_to_remember(torch.device("cuda"), 101) == (torch.device("cpu"), 2000)
    assert place_to_remember(torch.device("cuda"), 101, processes=2) == (torch.device("cpu"), 1000)
