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


ENTRIES = [
    *(f"moments/{letter * 32}" for letter in "abc"),
    *(f"{kind}-{letter * 16}" for kind, letter in (("inverted", "d"), ("written", "e"), ("inverted", "f"))),
]


def test_altered_sums_are_measured_again_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, _ = prune(tmp_path)
    (file,) = (tmp_path / "moments").iterdir()
    tensors, facts = Cache(tmp_path).read(f"moments/{file.stem}")
    content = file.read_bytes()

    def one_bit() -> None:
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])

    def sums() -> None:
        save_file({k: v * 2 for k, v in tensors.items()}, file, metadata=facts | {"sha256": "0" * 64})

    def counts() -> None:
        true = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["sha256"]
        save_file(tensors, file, metadata=facts | {"done": "47", "sha256": true})

    def cut() -> None:
        file.write_bytes(content[:100])

    for change in (one_bit, sums, counts, cut):
        change()
        caplog.clear()
        assert prune(tmp_path) == (plain, "")
        (line,) = caplog.messages
        assert line == f"the cache's entry {file} is not what was written; it is made anew"
        assert file.read_bytes()[-len(content) // 2 :] == content[-len(content) // 2 :]
    assert prune(tmp_path)[1].startswith("moments of 48 of 48") and len(caplog.messages) == 1


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
    alive, old, dead = ENTRIES[3], ENTRIES[0], ENTRIES[4]
    names = {
        f"{alive}.{os.getppid()}.part": True,
        f"{old}.{os.getppid()}.part": False,
        f"{dead}.{done.pid}.part": False,
    }
    names |= {"notes.1.part": True, "moments/mine.safetensors": True}
    (tmp_path / "moments").mkdir()
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / f"{old}.{os.getppid()}.part", (0, 0))
    assert cache.write(ENTRIES[5], {"x": torch.ones(2)}, {})
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert [path.stem for path in cache.entries()] == [ENTRIES[5]]


def test_all_entries_together_stay_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, limit=2500)
    first, second, third = ENTRIES[0], ENTRIES[3], ENTRIES[1]
    (tmp_path / "model.safetensors").write_bytes(bytes(9000))  # of somebody else: neither counted nor removed
    for number, name in enumerate((first, second, third)):
        assert cache.write(name, {"x": torch.full((200,), float(number))}, {})
        os.utime(tmp_path / f"{name}.safetensors", (number, number))
    assert cache.read(first) is None and cache.read(second) is not None  # which now is the one used last
    assert cache.write(ENTRIES[4], {"x": torch.zeros(200)}, {})
    assert {path.stem for path in cache.entries()} == {second, ENTRIES[4]}  # within one tick of the clock
    assert not cache.write(ENTRIES[5], {"x": torch.zeros(2500)}, {}) and len(cache.entries()) == 2
    assert (tmp_path / "model.safetensors").exists()
    monkeypatch.setenv("MODHIFI_CACHE_LIMIT", "0.5")
    assert Cache(tmp_path).limit == 2**29
    for text in ("many", "-1", "nan", "inf"):
        monkeypatch.setenv("MODHIFI_CACHE_LIMIT", text)
        with pytest.raises(ModhifiError, match="give a number of GiB"):
            MomentCache(tmp_path)


def test_moments_over_the_limit_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODHIFI_CACHE_LIMIT", "0")
    for _ in range(2):
        plan, remark = prune(tmp_path)
        assert plan == prune(None)[0] and "were not kept: the cache's limit" in remark


def test_the_verb_shows_and_clears(tmp_path: Path) -> None:
    Cache(tmp_path).write(ENTRIES[0], {"x": torch.zeros(50)}, {})
    (tmp_path / "model.safetensors").write_text("mine")
    shown = CliRunner().invoke(app, ["cache", "--cache", str(tmp_path), "--json"])
    assert json.loads(shown.stdout)["entries"] == 1 and json.loads(shown.stdout)["limit"] == 2**31
    assert f"{tmp_path}: 1 entry, " in CliRunner().invoke(app, ["cache", "--cache", str(tmp_path)]).stdout
    cleared = CliRunner().invoke(app, ["cache", "--cache", str(tmp_path), "--clear"])
    assert cleared.exit_code == 0 and f"{tmp_path}: 0 entries" in cleared.stdout
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["model.safetensors"]
    nowhere = CliRunner().invoke(app, ["cache", "--cache", str(tmp_path / "nowhere")])
    assert nowhere.exit_code == 0 and not (tmp_path / "nowhere").exists()


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(items: Slow, index: int) -> torch.Tensor:
        if list(tmp_path.glob("moments/*.safetensors")):
            raise KeyboardInterrupt
        return items.items[index]

    with monkeypatch.context() as patch:
        patch.setattr(Slow, "__getitem__", ended)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path)
    resumed, said = prune(tmp_path)
    assert "the rest measured" in said
    assert resumed == prune(None)[0]


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
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
