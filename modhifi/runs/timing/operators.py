"""Operators timed alone, on a coarse grid of their widths; kept on disk by device, runtime and versions."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from modhifi.disk import read_json
from modhifi.errors import ModhifiError
from modhifi.models.hooks import attached, on_input
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent, version_of
from modhifi.runs.timing.machine import channels_at_once, device_name
from modhifi.runs.timing.runtimes import RUNTIMES
from modhifi.runs.timing.turns import time_in_turns
from modhifi.structure.groups import Structure
from modhifi.structure.operators import conv_groups
from modhifi.structure.places import operator_at
from modhifi.structure.recurrent import Gates
from modhifi.structure.sizes import Term, sizes_of
from modhifi.structure.stacked import Stacked
from modhifi.structure.times import OperatorTime

# The shares of an operator's widths that are timed, the rounds of timing, and the operators timed in turns.
SHARES = (0.25, 0.5, 0.75, 1.0)
ROUNDS = 5
AT_ONCE = 16
PACKAGES = ("torch", "onnxruntime")
# Of how operators are timed: files of another number are not read. 2: freed memory is kept.
FORMAT = 2


def measure_operators(
    loaded: LoadedModel,
    structure: Structure,
    batch: Tensor,
    runtime: str,
    threads: int,
    cache: Path | None = None,
    progress: Progress = silent,
) -> tuple[OperatorTime, ...]:
    """The times of every conv and linear operator of a model on a grid of its widths, on the model's device.

    Operators of one shape are timed once; times that ``cache`` holds are not taken again. Matrices inside a parameter
    or a recurrent layer do not run alone and have no time of their own. Raises ModhifiError, before anything is timed,
    where a group changes the widths of one.
    """
    parameter = next(loaded.model.parameters())
    at_once = channels_at_once(parameter.device, parameter.dtype)
    terms = {t.module: t for t in sizes_of(loaded.model, structure).terms if t.module in structure.operators}
    terms = {name: t for name, t in terms.items() if t.input_total and t.output_total}
    terms = _alone(loaded.model, terms)
    shapes = _input_shapes(loaded, batch, terms)
    grids = {name: _grid(loaded.model.get_submodule(name), terms[name], at_once) for name in shapes}
    wanted = {
        name: [[_shape(loaded.model.get_submodule(name), shapes[name], i, o) for o in outs] for i in ins]
        for name, (ins, outs) in grids.items()
    }
    every = dict.fromkeys(shape for grid in wanted.values() for row in grid for shape in row)
    seconds = _timed(every, parameter.device, parameter.dtype, runtime, threads, cache, progress)
    result = []
    for name, grid in wanted.items():
        module = loaded.model.get_submodule(name)
        full = _operator(_shape(module, shapes[name], terms[name].input_total, terms[name].output_total))
        with torch.device("meta"):
            elements = _on_meta(full).numel()
        points = tuple(tuple(seconds[shape] for shape in row) for row in grid)
        result.append(OperatorTime(terms[name], *grids[name], points, elements, at_once))
    return tuple(result)


def _alone(model: nn.Module, terms: Mapping[str, Term]) -> dict[str, Term]:
    """The operators that are layers of their own; ModhifiError where the time of another one would have to be known."""
    inner = [name for name in terms if isinstance(operator_at(model, name), Stacked | Gates)]
    changed = [name for name in inner if terms[name].inputs or terms[name].outputs or terms[name].parts]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ModhifiError(
            f"the time of {changed[0]}{more} by its width is not known, as it does not run alone (experts in one "
            "parameter, the matrices of a recurrent layer); give --flops or --params in place of --latency, or "
            "--exclude their groups"
        )
    return {name: term for name, term in terms.items() if name not in inner}


def _input_shapes(loaded: LoadedModel, batch: Tensor, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shape of what every operator that runs receives."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        return lambda x: shapes.setdefault(name, tuple(x.shape))

    with torch.no_grad(), attached([on_input(loaded.model.get_submodule(n), note(n)) for n in names]):
        loaded.run(batch)
    return shapes


Shape = tuple[Any, ...]
"""What an operator's time depends on: its kind, widths, the shape of its input, and a conv's geometry."""


def _shape(module: nn.Module, received: tuple[int, ...], inputs: int, outputs: int) -> Shape:
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, _ConvNd):
        if _is_depthwise(module):
            inputs = outputs * module.in_channels // module.out_channels
        groups = inputs if _is_depthwise(module) else conv_groups(module)
        geometry: tuple[Any, ...] = (module.kernel_size, module.stride, module.padding, module.dilation)
        kind = "conv"
        if isinstance(module, _ConvTransposeNd):
            kind, geometry = "transposed conv", (*geometry, module.output_padding)
        return (kind, inputs, outputs, (received[0], inputs, *received[2:]), geometry, groups, bias)
    return ("linear", inputs, outputs, (*received[:-1], inputs), bias)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def _grid(module: nn.Module, term: Term, at_once: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input and output widths at which an operator is timed; one alone where no group changes a width."""
    if _is_depthwise(module):  # whose input is as wide as its output, however wide that is
        multiplier = term.output_total // term.input_total
        outputs = _points(term.output_total, bool(term.outputs), at_once, multiplier)
        return (term.input_total,), outputs
    parts = conv_groups(module)
    return (
        _points(term.input_total, bool(term.inputs), at_once, parts),
        _points(term.output_total, bool(term.outputs), at_once, parts),
    )


def _points(total: int, changes: bool, at_once: int, parts: int) -> tuple[int, ...]:
    """The widths nearest to the shares that a device takes at once and that ``parts`` divide, and half of the least."""
    if not changes:
        return (total,)
    step = math.lcm(at_once, parts)
    half = {step // 2} if step % (2 * parts) == 0 and step < 2 * total else set()
    return tuple(sorted({min(total, max(1, round(share * total / step)) * step) for share in SHARES} | {total} | half))


def _operator(shape: Shape) -> tuple[nn.Module, tuple[int, ...]]:
    """A fresh operator of a shape, on the meta device, and the shape of its input."""
    with torch.device("meta"):
        if shape[0] == "linear":
            return nn.Linear(shape[1], shape[2], bias=shape[4]), shape[3]
        name, inputs, outputs, received, (kernel, stride, padding, dilation, *more), groups, bias = shape
        if name == "transposed conv":
            transposed: Any = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}[len(received)]
            return transposed(inputs, outputs, kernel, stride, padding, *more, groups, bias, dilation), received
        kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(received)]
        return kind(inputs, outputs, kernel, stride, padding, dilation, groups, bias), received


def _on_meta(operator: tuple[nn.Module, tuple[int, ...]]) -> Tensor:
    module, received = operator
    output: Tensor = module(torch.empty(received))
    return output


def _timed(
    shapes: Iterable[Shape],
    device: torch.device,
    dtype: torch.dtype,
    runtime: str,
    threads: int,
    cache: Path | None,
    progress: Progress,
) -> dict[Shape, float]:
    """Seconds of one pass of each shape: the least of several rounds, as what disturbs only adds."""
    place = [FORMAT, device_name(device), runtime, threads, str(dtype), *map(version_of, PACKAGES)]
    file = None if cache is None else cache / f"{hashlib.sha256(json.dumps(place).encode()).hexdigest()[:32]}.json"
    known = {} if file is None else _read(file)
    seconds = {shape: known[str(shape)] for shape in shapes if str(shape) in known}
    missing = [shape for shape in shapes if shape not in seconds]
    for start in range(0, len(missing), AT_ONCE):
        progress("timing operators", start, len(missing))
        runs = {}
        for number, shape in enumerate(missing[start : start + AT_ONCE]):
            module, received = _operator(shape)
            module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
            for parameter in module.parameters():
                parameter.normal_(0, 0.02)
            inputs = torch.randn(received, device=device).to(dtype)
            runs[str(number)] = RUNTIMES[runtime].operator(module, inputs, threads)
        turns = time_in_turns(runs, threads, device.type != "cpu", rounds=ROUNDS, round_seconds=0.005)
        for number, shape in enumerate(missing[start : start + AT_ONCE]):
            seconds[shape] = min(turns.seconds[str(number)])
        if file is not None:
            _write(file, known | {str(shape): value for shape, value in seconds.items()})
    progress("timing operators", len(missing), len(missing))
    return seconds


def _read(file: Path) -> dict[str, float]:
    """The times in a file; none where there is no such file or it is broken."""
    try:
        content = read_json(file)
        return {str(name): float(value) for name, value in content.items()}
    except (OSError, ModhifiError, ValueError, TypeError, AttributeError):
        return {}


def _write(file: Path, content: Mapping[str, float]) -> None:
    """Replaces the file whole; a cache that cannot be written costs only the cache."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as part:
            json.dump(content, part)
        os.replace(name, file)
