"""Does the artefact give back the model that was saved? Asked of a fresh process."""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modhifi.data.samples import Samples
from modhifi.errors import SelfTestFailed
from modhifi.models.artifact import load_artifact
from modhifi.models.hub import first_line
from modhifi.models.loaded import LoadedModel, frozen
from modhifi.models.manifest import read_manifest
from modhifi.models.trust import no_network
from modhifi.structure.outputs import difference

# What the names of outputs begin with in the file for the fresh process.
OUTPUT = "output "
# Where new tensors begin, in bytes.
ALIGNED = 64


@dataclass(frozen=True)
class Loader:
    """A way to load an artefact without modhifi: timm's ``create_model``, or an Auto class of transformers.

    ``code`` says that the Python file in the directory is run.
    """

    framework: str
    name: str
    code: bool = False

    def __call__(self, directory: Path) -> LoadedModel:
        """Loads a directory as the model card says, in eval mode, with what is needed to feed the model."""
        source = str(directory)
        if self.framework == "timm":
            import timm

            from modhifi.models import from_timm

            return from_timm.loaded_from(frozen(timm.create_model(f"local-dir:{source}", pretrained=True)), source)
        import transformers

        from modhifi.models import from_transformers

        model = getattr(transformers, self.name).from_pretrained(source, trust_remote_code=self.code)
        return from_transformers.loaded_from(frozen(model), source, directory)


class FreshProcess:
    """A Python process that imports what loading an artefact takes, and waits to be told which one.

    Importing takes seconds: start it while there is other work. It ends when this object goes, and with this process.
    """

    def __init__(self, library: str = "torch") -> None:
        """``library`` is the one that builds the model: timm, transformers or torch."""
        # Code that comes with a model is copied there before it is run.
        self.folder = Path(tempfile.mkdtemp())
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from modhifi.artifacts.reload_check import _child; _child()", library],
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                "HF_MODULES_CACHE": str(self.folder / "modules"),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        weakref.finalize(self, _end, self.process, self.errors, self.folder)

    def difference(
        self, directory: str | Path, batch: Tensor, expected: Mapping[str, Tensor], loader: Loader | None = None
    ) -> str:
        """What differs between ``expected`` and the artefact's outputs on ``batch``, in words; empty if nothing.

        ``loader`` loads it; by default modhifi does.
        """
        file = self.folder / "batch.safetensors"
        content = {f"{OUTPUT}{name}": tensor for name, tensor in expected.items()} | {"batch": batch}
        # Copies: one tensor may be returned twice, or be a part of another.
        save_file({name: t.cpu().contiguous().clone() for name, t in content.items()}, file)
        # The same number of threads: sums over other shares round differently.
        request = [str(Path(directory).absolute()), str(file), torch.get_num_threads(), loader and astuple(loader)]
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return str(json.loads(self.process.stdout.readline()))
        except (BrokenPipeError, ValueError):  # it died
            self.process.wait()
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").strip().splitlines()
            return f"it fails in a fresh process: {lines[-1] if lines else 'no message'}"


def _end(process: subprocess.Popen[str], errors: IO[bytes], folder: Path) -> None:
    process.kill()
    with process, errors:  # they close its pipes and wait
        shutil.rmtree(folder, ignore_errors=True)


def check_reload(
    path: Path, original: LoadedModel, edited: nn.Module, held: Samples, process: FreshProcess | None = None
) -> Tensor:
    """Loads an artefact again and compares its outputs with those of ``edited``, on the CPU; returns the batch used.

    The batch holds at most 4 held-out samples; ``process`` is one that was started before. Where no library builds the
    dense module, ``original`` is its skeleton. Raises SelfTestFailed if anything differs.
    """
    batch = next(held.batches(min(4, len(held))))
    with torch.no_grad():
        expected = original.outputs(batch, edited)
    needs_skeleton = read_manifest(path).model.framework == "torch"
    verify_reload(path, batch, expected, original.model if needs_skeleton else None, process)
    return batch


def verify_reload(
    directory: str | Path,
    batch: Tensor,
    expected: Mapping[str, Tensor],
    skeleton: nn.Module | None = None,
    process: FreshProcess | None = None,
) -> None:
    """Loads the artefact in a fresh process and compares its outputs on ``batch`` with ``expected``, bit for bit.

    ``expected`` is what `LoadedModel.outputs` gives of the model in memory, computed on the CPU. With a ``skeleton``,
    which no other process has, the artefact is loaded in this one. Raises SelfTestFailed if anything differs or the
    process fails.
    """
    if skeleton is not None:
        with torch.inference_mode():
            outputs = load_artifact(directory, skeleton).outputs(batch)
        problem = compare_outputs(outputs, expected)
    else:
        problem = (process or FreshProcess()).difference(directory, batch, expected)
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
    """Runs in a :class:`FreshProcess`: imports, waits for requests, and answers each with what differs."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    gc.disable()  # nothing here is garbage before the process ends
    importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        try:
            answer = _answer(*json.loads(line))
        except Exception as error:
            answer = f"it fails in a fresh process: {first_line(error)}"
        print(json.dumps(answer), file=answers, flush=True)


def _align(model: nn.Module) -> None:
    """Copies the weights that begin anywhere in a mapped file: kernels round those otherwise than aligned ones."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNED:
            tensor.data = tensor.data.clone()


def _answer(directory: str, file: str, threads: int, loader: list[Any] | None) -> str:
    torch.set_num_threads(threads)
    tensors = load_file(file)
    expected = {name.removeprefix(OUTPUT): tensor for name, tensor in tensors.items() if name.startswith(OUTPUT)}
    with torch.inference_mode(), no_network():
        loaded = load_artifact(directory) if loader is None else Loader(*loader)(Path(directory))
        _align(loaded.model)
        return compare_outputs(loaded.outputs(tensors["batch"].clone()), expected)
