"""The check that an artefact gives back the model that was saved, in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modhifi.data.samples import Samples
from modhifi.errors import SelfTestFailed
from modhifi.models.artifact import load_artifact
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import read_manifest


def check_reload(path: Path, original: LoadedModel, edited: nn.Module, held: Samples) -> Tensor:
    """Loads an artefact again and compares its outputs with those of ``edited``, on the CPU; returns the batch used.

    The batch holds at most 4 held-out samples. Where no library builds the dense module, ``original`` is its skeleton.
    Raises SelfTestFailed if anything
    differs.
    """
    batch = next(held.batches(min(4, len(held))))
    with torch.no_grad():
        expected = original.logits(batch, edited)
    needs_skeleton = read_manifest(path).model.framework == "torch"
    verify_reload(path, batch, expected, original.model if needs_skeleton else None)
    return batch


def verify_reload(directory: str | Path, batch: Tensor, expected: Tensor, skeleton: nn.Module | None = None) -> None:
    """Loads the artefact in a fresh process and compares its outputs on ``batch`` with ``expected``, bit for bit.

    ``expected`` are the logits of the model in memory, computed on the CPU. With a ``skeleton``, which no other process
    has, the artefact is loaded in this one. Raises SelfTestFailed if anything differs or the process fails.
    """
    if skeleton is not None:
        with torch.inference_mode():
            outputs = load_artifact(directory, skeleton).logits(batch)
        problem = compare_outputs(outputs, expected)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "batch.safetensors"
            save_file({"batch": batch.cpu().contiguous(), "expected": expected.cpu().contiguous()}, file)
            # The same number of threads: sums over other shares round differently.
            arguments = [str(Path(directory).absolute()), str(file), str(torch.get_num_threads())]
            run = subprocess.run(
                [sys.executable, "-c", "from modhifi.artifacts.reload_check import _child; _child()", *arguments],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
                capture_output=True,
                text=True,
            )
        last_line = (run.stderr.strip().splitlines() or ["no message"])[-1]
        problem = run.stdout.strip() if run.returncode == 0 else f"it fails in a fresh process: {last_line}"
    if problem:
        raise SelfTestFailed(f"the artefact {directory} does not give back the model that was saved: {problem}")


def compare_outputs(outputs: Tensor, expected: Tensor) -> str:
    """The difference between two tensors, in words; empty where they are equal to the bit."""
    if outputs.shape != expected.shape or outputs.dtype != expected.dtype:
        return f"{outputs.dtype} {tuple(outputs.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    if torch.equal(outputs, expected):
        return ""
    return f"outputs differ by up to {(outputs.double() - expected.double()).abs().max().item():.3g}"


def _child() -> None:
    """The fresh process of :func:`verify_reload`."""
    directory, file, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    tensors = load_file(file)
    with torch.inference_mode():
        print(compare_outputs(load_artifact(directory).logits(tensors["batch"].clone()), tensors["expected"]))
