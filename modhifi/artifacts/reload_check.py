"""Does the artefact give back the model that was saved? Asked of a fresh process."""

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


def reload_alike(path: Path, loaded: LoadedModel, edited: nn.Module, held: Samples) -> Tensor:
    """Load an artefact again and compare its outputs with those of ``edited``, on the CPU; the batch that was used.

    Where no library builds the dense module anew, the one in memory is its skeleton. Raises SelfTestFailed if anything
    differs.
    """
    batch = next(held.batches(min(4, len(held))))
    with torch.no_grad():
        expected = loaded.logits(batch, edited)
    own = read_manifest(path).model.framework == "torch"
    verify_reload(path, batch, expected, loaded.model if own else None)
    return batch


def verify_reload(directory: str | Path, batch: Tensor, expected: Tensor, skeleton: nn.Module | None = None) -> None:
    """Load the artefact in a fresh process and compare its outputs on ``batch`` with ``expected``, bit for bit.

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
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        problem = run.stdout.strip() if run.returncode == 0 else f"it fails in a fresh process: {last}"
    if problem:
        raise SelfTestFailed(f"the artefact {directory} does not give back the model that was saved: {problem}")


def compare_outputs(outputs: Tensor, expected: Tensor) -> str:
    """What is different between two tensors, in words; empty if nothing is, to the bit."""
    if outputs.shape != expected.shape or outputs.dtype != expected.dtype:
        return f"{outputs.dtype} {tuple(outputs.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    if torch.equal(outputs, expected):
        return ""
    return f"outputs differ by up to {(outputs.double() - expected.double()).abs().max().item():.3g}"


def _child() -> None:
    """The fresh process of :func:`verify_reload`."""
    directory, file, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    given = load_file(file)
    with torch.inference_mode():
        print(compare_outputs(load_artifact(directory).logits(given["batch"].clone()), given["expected"]))
