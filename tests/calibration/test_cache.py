"""Moments on disk: reused by a second budget, and an interrupted pass ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import modhifi
from modhifi import cache as store
from modhifi import progress
from modhifi.cache import Cache
from modhifi.calibration.cache import MomentCache
from modhifi.cli.main import app
from modhifi.data.in_memory import from_items
from modhifi.errors import ModhifiError
from modhifi.models import fingerprint as fingerprints
from modhifi.models.weights import state_hash
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings

SAMPLES = 48


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def images() -> torch.Tensor:
    return torch.randn(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Slow:
    """The images, each of which takes a while: a pass that can be interrupted."""

    def __init__(self, seconds: float) -> None:
        self.items, self.seconds = images(), seconds

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.items[index]


def prune(directory: Path | None, ratio: float = 0.4, seed: int = 0, seconds: float = 0.0) -> tuple[str, str]:
    loaded = modhifi.load_model(net(), example=images()[:2])
    samples = from_items(Slow(seconds), None, n=SAMPLES, seed=0)
    settings = PruneSettings(batch_size=4, seed=seed)
    cache = None if directory is None else MomentCache(directory)
    pruned = prune_model(loaded, samples, Budget("components", 1 - ratio), settings, cache=cache)
    return state_hash(pruned.model), "" if cache is None else cache.remark


def test_a_second_ratio_reuses_the_moments(tmp_path: Path) -> None:
    plain, _ = prune(None)
    first, said = prune(tmp_path)
    assert first == plain and said == ""
    (file,) = (tmp_path / "moments").iterdir()
    again, said = prune(tmp_path)
    assert again == plain and f"{SAMPLES} of {SAMPLES} samples were taken from the cache" in said
    assert "s saved" in said and "rest" not in said
    other, said = prune(tmp_path, ratio=0.6)
    assert other == prune(None, ratio=0.6)[0] != plain and "from the cache" in said
    assert prune(tmp_path, seed=1)[1] == ""
    file.write_bytes(b"broken")
    assert prune(tmp_path) == (plain, "")


def test_altered_sums_are_measured_again(tmp_path: Path) -> None:
    plain, _ = prune(tmp_path)
    (file,) = (tmp_path / "moments").iterdir()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert prune(tmp_path) == (plain, "")
    tensors, facts = Cache(tmp_path).read(f"moments/{file.stem}")
    save_file({k: v * 2 for k, v in tensors.items()}, file, metadata=facts | {"sha256": "0" * 64})
    assert prune(tmp_path) == (plain, "")
    assert prune(tmp_path)[1]


@pytest.mark.parametrize("change", ["forward", "timm", "transformers", "torch", "modhifi"])
def test_another_behaviour_of_the_same_weights_is_another_model(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(tmp_path)
    if change == "forward":
        own = nn.ReLU.forward
        monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: own(self, x) ** 2)
    else:
        known = progress.version_of
        monkeypatch.setattr(fingerprints, "version_of", lambda name: "0" if name == change else known(name))
    assert prune(tmp_path) == (prune(None)[0], "")


def test_what_killed_processes_were_writing_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    names = {"a.part": False, f"a.{done.pid}.part": False, f"a.{os.getppid()}.part": True, "moments/b.1.part": False}
    (tmp_path / "moments").mkdir()
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / "moments/b.1.part", (0, 0))
    cache.write("c", {"x": torch.ones(2)}, {})
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert [path.name for path in cache.entries()] == ["c.safetensors"]


def test_all_entries_together_stay_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, limit=2500)
    for number, name in enumerate(("moments/a", "inverted-b", "moments/c")):
        cache.write(name, {"x": torch.full((200,), float(number))}, {})
        if (file := tmp_path / f"{name}.safetensors").exists():
            os.utime(file, (number, number))
    assert cache.read("moments/a") is None and cache.read("inverted-b") is not None
    os.utime(tmp_path / "moments" / "c.safetensors", (2, 2))  # the other one was used just now
    cache.write("d", {"x": torch.zeros(200)}, {})
    assert {path.stem for path in cache.entries()} == {"inverted-b", "d"}
    cache.write("e", {"x": torch.zeros(2500)}, {})
    assert cache.read("e") is None
    monkeypatch.setenv("MODHIFI_CACHE_LIMIT", "0.5")
    assert Cache(tmp_path).limit == 2**29
    for text in ("many", "-1", "nan", "inf"):
        monkeypatch.setenv("MODHIFI_CACHE_LIMIT", text)
        with pytest.raises(ModhifiError, match="give a number of GiB"):
            MomentCache(tmp_path)


def test_the_verb_shows_and_clears(tmp_path: Path) -> None:
    Cache(tmp_path).write("moments/a", {"x": torch.zeros(50)}, {})
    (tmp_path / "notes.txt").write_text("mine")
    shown = CliRunner().invoke(app, ["cache", "--cache", str(tmp_path), "--json"])
    assert json.loads(shown.stdout)["entries"] == 1 and json.loads(shown.stdout)["limit"] == 2**31
    cleared = CliRunner().invoke(app, ["cache", "--cache", str(tmp_path), "--clear"])
    assert cleared.exit_code == 0 and f"{tmp_path}: 0 entries" in cleared.stdout
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["notes.txt"]


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    script = "import test_cache as t, sys, pathlib; t.prune(pathlib.Path(sys.argv[1]), seconds=0.02)"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=os.environ | {"PYTHONPATH": path})
    until = time.monotonic() + 60
    try:
        while not list(tmp_path.glob("moments/*.safetensors")):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed, said = prune(tmp_path)
    assert "the rest measured" in said
    assert resumed == prune(None)[0]


def test_the_cache_stays_small_and_a_full_disk_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prune(tmp_path)[0]
    (first,) = (tmp_path / "moments").iterdir()
    os.utime(first, (0, 0))
    # Room for one and a half such files.
    room = first.stat().st_size * 1.5 / store.SHARE
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": room}))
    prune(tmp_path, seed=1)
    (second,) = (tmp_path / "moments").iterdir()
    assert second != first
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    assert prune(tmp_path)[0] == plain
    (tmp_path / "file").write_text("")
    assert prune(tmp_path / "file")[0] == plain


def test_the_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODHIFI_CACHE", str(tmp_path))
    assert store.default_directory() == tmp_path
    monkeypatch.delenv("MODHIFI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.default_directory() == tmp_path / "xdg" / "modhifi"
