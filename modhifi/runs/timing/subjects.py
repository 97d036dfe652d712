"""What is timed: models and ONNX files, each with its inputs and with the original that it is compared to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.models.hub import explained
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.runs.defaults import amounts
from modhifi.runs.inputs import load_source, original_of
from modhifi.runs.measure import device_of
from modhifi.runs.recipes.prune import ModelSource
from modhifi.runs.timing.runtimes.base import Program, Runtime


@dataclass(frozen=True)
class Subject:
    """A model, or an ONNX file with ``example``, a batch of inputs; ``reference`` is the label that it compares to."""

    label: str
    reference: str
    model: LoadedModel | Path
    example: Tensor

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu") if isinstance(self.model, Path) else device_of(self.model.model)

    def batch(self, items: int, window: int | None = None) -> Tensor:
        """A batch of that many inputs, on its device, in its dtype; texts are as long as ``window``."""
        example = self.example
        if isinstance(self.model, LoadedModel) and self.model.reads_tokens:
            tokens = window or amounts(self.model, self.device).window or example.shape[1]
            repeats = -(-items * tokens // example.numel())
            example = example.flatten().repeat(repeats)[: items * tokens].reshape(items, tokens)
        rows = example[torch.arange(items) % len(example)]
        if isinstance(self.model, Path):
            return rows
        dtype = next((p.dtype for p in self.model.model.parameters()), None) if rows.is_floating_point() else None
        return rows.to(self.device, dtype)

    def load(self, runtime: Runtime, window: int | None = None) -> Program:
        """The program that a runtime makes of it; raises ModhifiError where it can make none."""
        if isinstance(self.model, LoadedModel):
            return runtime.load(self.model.of_one_batch(self.model.model), self.batch(2, window))
        if runtime.open is None:
            raise ModhifiError(f"{self.label} is a file that {runtime.name} does not run; give --runtime onnx")
        return runtime.open(self.model)


def subjects_of(
    models: Sequence[str | Path | LoadedModel], device: torch.device | str, loading: ModelSource | None = None
) -> tuple[list[Subject], list[str]]:
    """The subjects of several models, an artefact's original before it, and sentences on originals that are missing.

    An artefact is compared to the original that its manifest names, everything else to the first subject. ``loading``
    says how models named ``timm:`` and ``hf:`` are loaded. Raises ModhifiError for a model that cannot be loaded.
    """
    subjects: list[Subject] = []
    notes: list[str] = []
    for model in models:
        if isinstance(model, LoadedModel):
            loaded = model
        elif str(model).endswith(".onnx"):
            subjects.append(_file(Path(model), subjects))
            continue
        else:
            loaded = _load(str(model), loading)
        reference = None
        if loaded.artifact is not None:
            source = original_of(loaded.artifact.manifest)
            reference = source.name
            if reference not in {s.label for s in subjects}:
                try:
                    subjects.append(_subject(load_source(source), source.name, subjects, device, source.name))
                except ModhifiError as error:
                    notes.append(f"{loaded.source}: its original is not compared: {error}")
                    reference = None
        subjects.append(_subject(loaded, loaded.source, subjects, device, reference))
    return subjects, notes


def _load(name: str, loading: ModelSource | None) -> LoadedModel:
    if loading is None or not name.startswith(("timm:", "hf:")):
        return load_model(name)
    return load_source(loading.model_copy(update={"name": name}))


def _subject(
    loaded: LoadedModel, label: str, others: Sequence[Subject], device: torch.device | str, reference: str | None
) -> Subject:
    taken = {s.label for s in others}
    number = next(n for n in range(1, len(taken) + 2) if (label if n == 1 else f"{label} ({n})") not in taken)
    label = label if number == 1 else f"{label} ({number})"
    loaded.model.to(device)
    return Subject(label, reference or (others[0].label if others else label), loaded, loaded.example)


def _file(path: Path, others: Sequence[Subject]) -> Subject:
    """The subject of an ONNX file, with random inputs of the shape that it states."""
    from modhifi.artifacts.exports import EXPORTS

    EXPORTS["onnx"].check()
    import onnxruntime

    if not path.is_file():
        raise ModhifiError(f"there is no file {path}; give an ONNX file, a directory or a name")
    with explained(str(path)):
        first, *more = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()
    if more:
        raise ModhifiError(f"{path} has {1 + len(more)} inputs; a bench feeds files with one")
    shape = [size if isinstance(size, int) else 2 if axis == 0 else 0 for axis, size in enumerate(first.shape)]
    if 0 in shape:
        raise ModhifiError(f"{path} does not state the size of its input ({first.shape}); export it with one")
    generator = torch.Generator().manual_seed(0)
    kind = re.sub(r"tensor\((.*)\)", r"\1", first.type)
    makers: dict[str, Callable[[], Tensor]] = {
        "float": lambda: torch.randn(shape, generator=generator),
        "float16": lambda: torch.randn(shape, generator=generator).half(),
        "int64": lambda: torch.randint(2, shape, generator=generator),
    }
    if kind not in makers:
        raise ModhifiError(f"{path} takes {kind}; a bench feeds {', '.join(makers)}")
    return Subject(str(path), others[0].label if others else str(path), path, makers[kind]())
