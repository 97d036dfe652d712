"""Several processes of one run: shares of the calibration data, one plan."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from team import in_team
from typer.testing import CliRunner

from modhifi.calibration import accumulator
from modhifi.calibration.accumulator import Accumulator
from modhifi.calibration.distributed import (
    ALONE,
    PATIENCE,
    InStep,
    Processes,
    batches_together,
    merged,
    processes,
    share_of,
)
from modhifi.calibration.moments import Moments
from modhifi.calibration.sampling import Sampling
from modhifi.cli.main import app
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.pruning.stages import find_structure, measure_moments

ALONE_IN_PAIRS = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", *ALONE_IN_PAIRS.split(), "--main_process_port"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
}


def free_port() -> str:
    """Launchers that run side by side would both take their usual one."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def launch(launcher: str, where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], free_port(), "-m", "modhifi", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=where,
        timeout=240,
    )


@pytest.mark.slow  # tests/pruning/test_processes.py has processes of its own, which start faster
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_processes_make_the_plan_of_one(launcher: str, model_dir: Path, image_dir: Path, tmp_path: Path) -> None:
    """What the sums add up to, rows looked at included; only the main process prints."""
    arguments = [
        "prune",
        str(model_dir),
        "--data",
        f"images:{image_dir}",
        "--samples",
        "30",
        "--evaluation-samples",
        "10",
        "--batch-size",
        "4",
        "--ratio",
        "0.4",
        "--device",
        "cpu",
        "--dry-run",
        "--json",
        "--no-cache",
    ]
    together = launch(launcher, tmp_path, *arguments)
    assert together.returncode == 0, together.stderr
    alone = CliRunner().invoke(app, arguments)
    assert alone.exit_code == 0, alone.output
    theirs, ours = json.loads(together.stdout), json.loads(alone.stdout)
    assert theirs["data"]["moments"] == "moments were measured by 2 processes"
    assert theirs["plan"]["kept"] == ours["plan"]["kept"]
    assert theirs["plan"]["removal_cost"] == pytest.approx(ours["plan"]["removal_cost"], rel=1e-9, abs=1e-12)
    for one, two in zip(theirs["groups"], ours["groups"], strict=True):
        assert one["local_error"] == pytest.approx(two["local_error"], rel=1e-9, abs=1e-12)


def test_processes_that_cannot_be_joined_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would do, and write, the whole."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    waits = []

    def state(cpu: bool, timeout: timedelta) -> SimpleNamespace:
        waits.append(timeout)
        return SimpleNamespace(num_processes=1, device="cpu")

    monkeypatch.setattr(accelerate, "PartialState", state)
    with pytest.raises(ModhifiError, match="2 processes were started and cannot be joined"):
        processes()
    assert waits == [PATIENCE]


def test_one_process_is_no_team() -> None:
    assert Processes().main and not Processes(1, 2).main
    assert merged({}, Processes()) == {}


@pytest.mark.parametrize(
    "batches, count, together", [(3, 3, 1), (8, 4, 2), (70, 4, 8), (33, 3, 4), (9, 9, 2), (20, 4, 2), (40, 30, 4)]
)
def test_batches_are_dealt_in_runs_and_everyone_gets_some(batches: int, count: int, together: int) -> None:
    names = tuple(map(str, range(5 * batches - 2)))
    samples = Samples(lambda i: torch.zeros(1), names, None, names, "test", False)
    shares = [list(share_of(samples, 5, Processes(index, count))) for index in range(count)]
    assert sorted(sum(shares, [])) == list(range(0, 5 * batches, 5)) and all(shares)
    assert batches_together(len(samples), 5) == together
    if batches >= count * together:
        runs = [{first // (5 * together) for first in share} for share in shares]
        assert sum(map(len, runs)) == len(set().union(*runs)), "a run was split"


@pytest.mark.parametrize("most", [1024, 4, 2])
def test_sums_of_processes_are_those_of_one_to_the_last_digits(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with a mean that only a shift takes away, in batches that are dealt in runs.

    A first batch of five is held, or too large for that.
    """
    monkeypatch.setattr(accumulator, "HELD_ROWS", most)
    monkeypatch.setattr(accumulator, "HELD_ELEMENTS", 1)
    rows = torch.randn(1, 6, 32 * 5, generator=torch.Generator().manual_seed(0)) + 100
    names = tuple(map(str, range(32)))
    samples = Samples(lambda i: rows[:, :, 5 * i : 5 * i + 5], names, None, names, "test", False)

    def run(team: Processes) -> Moments:
        sums = Accumulator()
        step = InStep({"it": sums}, 32, 1, team)
        for number in share_of(samples, 1, team):
            step.start(number)
            sums.add(samples.load(number))
        step.agree()
        return merged({"it": sums.finish()}, team)["it"]

    one, *several = run(ALONE), *in_team(4, tmp_path, run)
    for moments in several:
        assert moments.n == one.n == 160
        torch.testing.assert_close(moments.mean, one.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(moments.cov, one.cov, rtol=1e-12, atol=1e-13)


def test_too_few_batches_are_named(model_dir: Path) -> None:
    loaded = load_model(str(model_dir))
    names = tuple(f"{i:016x}" for i in range(6))
    samples = Samples(lambda i: torch.zeros(3, 32, 32), names, None, names, "test", False)
    with pytest.raises(ModhifiError, match="fewer processes"):
        measure_moments(loaded, find_structure(loaded), samples, Sampling(batch_size=4), team=Processes(0, 3))
