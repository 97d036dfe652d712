"""Signals that end a run, sent by the run to itself at a moment that is known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# What is patched so that the signal comes behind it, while the file of moments, or the artefact, is half done.
MOMENTS, ARTEFACT = "modhifi.cache.save_file", "modhifi.artifacts.save._write_weights"
RUN = """
import importlib, os, signal, sys
_, name, attribute, number, *sys.argv = sys.argv
module = importlib.import_module(name)
real = getattr(module, attribute)

def ended(*args, **kwargs):
    result = real(*args, **kwargs)
    os.kill(os.getpid(), int(number))
    return result

setattr(module, attribute, ended)
from modhifi.cli.main import main
main()
"""


def ended(
    place: str, number: int, out: Path, cache: Path, *more: str, ignored: bool = False
) -> subprocess.CompletedProcess[str]:
    """A small pruning run that a signal meets."""
    name, _, attribute = place.rpartition(".")
    command = ["modhifi", "prune", "demo:resnet", "--data", "demo:calibration", "--samples", "16", "--ratio", "0.2"]
    command += ["--evaluation-samples", "4", "--walked", "0", "--only", "conv1*", "--cache", str(cache), "--quiet"]
    return subprocess.run(
        [sys.executable, "-c", RUN, name, attribute, str(int(number)), *command, "--out", str(out), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        # A shell starts background jobs, these tests too, with interrupts ignored, which children inherit.
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL) and None,
    )


@pytest.mark.parametrize(
    ("place", "number", "code", "said"),
    [
        (MOMENTS, signal.SIGTERM, 143, "ended by SIGTERM"),
        (ARTEFACT, signal.SIGINT, 130, "interrupted"),
        pytest.param(ARTEFACT, signal.SIGTERM, 143, "ended by SIGTERM", marks=pytest.mark.slow),
        pytest.param(ARTEFACT, signal.SIGHUP, 129, "ended by SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_and_leaves_nothing(
    tmp_path: Path, place: str, number: signal.Signals, code: int, said: str
) -> None:
    out, cache = tmp_path / "place" / "out", tmp_path / "cache"
    out.parent.mkdir()
    done = ended(place, number, out, cache)
    assert done.returncode == code, done.stderr
    assert done.stderr == f"modhifi: {said}\n"
    assert not list(out.parent.iterdir())
    assert not list(cache.rglob("*.part"))


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    done = ended(MOMENTS, signal.SIGHUP, tmp_path / "out", tmp_path / "cache", "--dry-run", ignored=True)
    assert done.returncode == 0, done.stderr
