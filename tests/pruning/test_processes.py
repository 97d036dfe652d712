"""A pruning run shared by processes: block by block, reader after reader, and where one of them is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import tiny_transformers
import torch
from team import in_team

from modhifi.calibration import accumulator
from modhifi.calibration.distributed import ALONE, Processes, share_of
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.errors import IndefiniteError, ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.offload import let_visit
from modhifi.pruning import sequential
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import contribute, prune_model
from modhifi.pruning.settings import PruneSettings

BLOCKS = PruneSettings(layout="uniform", batch_size=2)
READERS = PruneSettings(weighting="energy", sequential="dense", batch_size=2)
HALF = Budget("components", 0.5)
# Products of rows are float32, but the same rows are multiplied at a time.
CLOSE = 1e-9
LENGTHS = [12, 12, 9, 12, 7, 12, 12, 12, 5]


def llama(_: Path) -> LoadedModel:
    return load_model(tiny_text.llama(num_hidden_layers=3))


def offloaded(_: Path) -> LoadedModel:
    loaded = llama(_)
    let_visit(loaded.model, [f"model.layers.{i}" for i in range(3)], "cpu")
    return loaded


def mixtral(_: Path) -> LoadedModel:
    model = tiny_transformers.family("mixtral")[0]
    model.resize_token_embeddings(tiny_text.VOCABULARY)
    return load_model(model)


CASES: dict[str, tuple[Callable[[Path], LoadedModel], PruneSettings]] = {
    "blocks": (llama, BLOCKS),
    "offloaded blocks": (offloaded, BLOCKS),
    "blocks of experts": (mixtral, BLOCKS),
    "readers": (llama, READERS),
    "readers, own target": (llama, replace(READERS, sequential="own")),
    "convolutions": (load_model, READERS),
    "convolutions, few rows": (load_model, READERS),
    "blocks, few rows": (llama, BLOCKS),
}
LONG = ("readers, own target", "convolutions, few rows")
COUNTS = {"blocks": [2, 4], "readers": [4]}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One thread, as in a process of a team: products may be added up otherwise by several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def part(loaded: LoadedModel, samples: Samples, settings: PruneSettings, team: Processes) -> Any:
    """What one of the processes does: the main one returns plan, weights and errors."""
    if not team.main:
        return contribute(loaded, samples, settings, None, team)
    pruned = prune_model(loaded, samples, HALF, settings, team=team)
    return pruned.plan.kept, pruned.model.state_dict(), [error.error for error in pruned.errors]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in CASES])
def test_processes_prune_as_one_does(
    name: str, model_dir: Path, image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loads its share of the batches and no other sample, but for the first, which tells the size."""
    build, settings = CASES[name]
    loaded = build(model_dir)
    if loaded.kind == "image":
        samples = load_samples(f"images:{image_dir}", loaded, n=20)
    else:
        samples = tiny_text.token_samples(LENGTHS)
    if "few rows" in name:
        monkeypatch.setattr(accumulator, "LARGE", 1)
    kept, weights, errors = part(loaded, samples, settings, ALONE)

    def run(team: Processes) -> Any:
        seen = set[int]()

        def load(i: int) -> torch.Tensor:
            seen.add(i)
            return samples.load(i)

        return part(loaded, replace(samples, load=load), settings, team), seen

    for count in COUNTS.get(name, [2]):
        where = tmp_path / str(count)
        where.mkdir()
        ((plan, state, theirs), _), *others = in_team(count, where, run)
        assert plan == kept and plan
        for key, ours in weights.items():
            assert float((state[key] - ours).float().norm()) <= CLOSE * float(ours.float().norm()), key
        assert theirs == pytest.approx(errors, rel=CLOSE, abs=1e-9)
        for index, (_, seen) in enumerate(others, 1):
            firsts = share_of(samples, settings.batch_size, Processes(index, count))
            assert seen - {0} == {i for first in firsts for i in (first, first + 1) if i < len(samples)} - {0}


@pytest.mark.parametrize("name", ["blocks", "readers"])
@pytest.mark.parametrize("lost", ["ends", pytest.param("sleeps", marks=pytest.mark.slow)])
def test_a_lost_process_ends_the_run_with_one_line(name: str, lost: str, model_dir: Path, tmp_path: Path) -> None:
    """In the middle of the passes over blocks and readers."""
    build, settings = CASES[name]
    loaded, samples = build(model_dir), tiny_text.token_samples(LENGTHS)

    def leave() -> None:
        time.sleep(4 if lost == "sleeps" else 0)
        os._exit(3)

    def run(team: Processes) -> Any:
        if not team.main:
            layer = loaded.model.get_submodule("model.layers.1.mlp.down_proj")
            layer.register_forward_pre_hook(lambda *_: leave())
        return part(loaded, samples, settings, team)

    main, _ = in_team(2, tmp_path, run, seconds=3)
    assert isinstance(main, ModhifiError) and "\n" not in str(main)
    assert str(main).startswith("another process of this run has ended, or was silent")


def test_a_group_without_a_solution_is_left_by_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process makes another plan, which the others follow."""
    loaded, samples = llama(tmp_path), tiny_text.token_samples(LENGTHS)
    compensate = sequential.compensate

    def failing(passes: Any, structure: Any, reader: str, *rest: Any) -> Any:
        if reader == "model.layers.1.mlp.down_proj":
            raise IndefiniteError
        return compensate(passes, structure, reader, *rest)

    monkeypatch.setattr(sequential, "compensate", failing)
    (kept, weights, _), _ = in_team(2, tmp_path, partial(part, loaded, samples, READERS))
    assert kept and "model.layers.1.mlp.gate_proj" not in kept
    torch.testing.assert_close(weights, part(loaded, samples, READERS, ALONE)[1], rtol=1e-4, atol=1e-5)
