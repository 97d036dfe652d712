"""Does the artefact give back the model that was saved? Asked of a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modhifi.data.samples import Samples
from modhifi.errors import SelfTestFailed
from modhifi.models.artifact import load_artifact
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import read_manifest
from modhifi.structure.outputs import difference

# What the names of outputs begin with in the file for the fresh process.
OUTPUT = "output "


def reload_alike(path: Path, loaded: LoadedModel, edited: nn.Module, held: Samples) -> Tensor:
    """Load an artefact again and compare all its outputs with those of ``edited``, on the CPU; the batch that was used.

    Where no library builds the dense module anew, the one in memory is its skeleton. Raises SelfTestFailed if anything
    differs.
    """
    batch = next(held.batches(min(4, len(held))))
    with torch.no_grad():
        expected = loaded.outputs(batch, edited)
    own = read_manifest(path).model.framework == "torch"
    verify_reload(path, batch, expected, loaded.model if own else None)
    return batch


def verify_reload(
    directory: str | Path, batch: Tensor, expected: Mapping[str, Tensor], skeleton: nn.Module | None = None
) -> None:
    """Load the artefact in a fresh process and compare its outputs on ``batch`` with ``expected``, bit for bit.

    ``expected`` is what `LoadedModel.outputs` gives of the model in memory, computed on the CPU. With a ``skeleton``,
    which no other process has, the artefact is loaded in this one. Raises SelfTestFailed if anything differs or the
    process fails.
    """
    if skeleton is not None:
        with torch.inference_mode():
            outputs = load_artifact(directory, skeleton).outputs(batch)
        problem = compare_outputs(outputs, expected)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "batch.safetensors"
            content = {f"{OUTPUT}{name}": tensor for name, tensor in expected.items()} | {"batch": batch}
            # Copies: one tensor may be returned twice, or be a part of another.
            save_file({name: t.cpu().contiguous().clone() for name, t in content.items()}, file)
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


def compare_outputs(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first difference between two sets of outputs, in words; empty if there is none, to the bit."""
    if outputs.keys() != expected.keys():
        return f"it returns {', '.join(outputs)} instead of {', '.join(expected)}"
    for name, wanted in expected.items():
        if problem := _compare(outputs[name], wanted):
            return f"output '{name}': {problem}" if name else problem
    return ""


def _compare(output: Tensor, expected: Tensor) -> str:
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return f"{output.dtype} {tuple(output.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    if bool(((output == expected) | (output.isnan() & expected.isnan())).all()):
        return ""
    return f"it differs by {difference(output, expected):.3g} of its norm"


def _child() -> None:
    """The fresh process of :func:`verify_reload`."""
    directory, file, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    given = load_file(file)
    expected = {name.removeprefix(OUTPUT): t for name, t in given.items() if name.startswith(OUTPUT)}
    with torch.inference_mode():
        print(compare_outputs(load_artifact(directory).outputs(given["batch"].clone()), expected))
