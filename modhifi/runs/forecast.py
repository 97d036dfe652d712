"""What a run will take, before it starts: minutes, memory, and disk for its cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from modhifi.cache import size_limit
from modhifi.calibration.memory import COPIES, gram_bytes, moment_bytes, room_to_remember, rows_seen
from modhifi.calibration.sampling import Sampling
from modhifi.calibration.timeline import Timeline
from modhifi.models.hooks import attached
from modhifi.models.loaded import LoadedModel
from modhifi.runs.defaults import Amounts
from modhifi.structure.groups import Structure
from modhifi.structure.operators import columns_of, operator_modules
from modhifi.structure.torch_ops import tensors_in

# How often the weights of the largest reader are there in float64 while it is solved for.
FLOAT64_COPIES = 5
# Passes over the calibration data that sequential compensation adds, by its target.
STREAMS = {None: 0, "own": 1, "dense": 2}


def forecast(
    loaded: LoadedModel,
    structure: Structure,
    usual: Amounts,
    sampling: Sampling,
    sequential: str | None = None,
    blocks: bool = False,
) -> dict[str, float]:
    """An estimate of what a run takes: ``seconds``, ``bytes`` at its peak, and ``disk`` bytes of its cache.

    One pass on the example is timed, on a model that has run before. A run makes one for every calibration sample, two
    for every held-out one and those of ``sequential``, the moments of every reader, and about four matrix products of
    each Gram's size in float64, at half of that pass's speed. In memory are the model, its edited copy, the moments, of
    which ``blocks`` says that one block's are there at a time, what is worked on, the largest weights in float64 among
    it, and the ``activations``: the input and output of the largest layer for a batch, and what sequential compensation
    remembers.
    """
    device = next(loaded.model.parameters()).device
    start = time.perf_counter()
    with _largest(loaded.model) as largest:
        loaded.outputs(loaded.example)
    items = len(loaded.example)
    pace = (time.perf_counter() - start) / items
    length = 1.0 if usual.window is None else usual.window / loaded.example.shape[1]
    readers = dict(operator_modules(loaded.model, structure.prunable))
    products, sizes, widest = 0.0, [], 0
    for name, module in readers.items():
        rows = rows_seen(module, structure.operators[name].macs, usual.samples * length, sampling)
        groups, columns = columns_of(module)
        sizes.append(moment_bytes(module, rows))
        widest = max(widest, module.get_parameter("weight").numel())
        span = columns if sizes[-1] == gram_bytes(module) else rows
        products += groups * columns * span * (rows + 2 * COPIES * span)
    passes = (1 + STREAMS[sequential]) * usual.samples + 2 * usual.evaluation_samples
    seconds = pace * length * passes + pace * products / max(1, structure.macs)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    activations = largest[0] * usual.batch_size * length / items
    if sequential is not None:
        timeline = Timeline(loaded.model, lambda: loaded.run(loaded.example))
        remembered = STREAMS[sequential] * timeline.most_before(readers) * usual.samples * length / items
        activations += min(remembered, room_to_remember(device))
    held = max(sizes, default=0) if blocks else sum(sizes)
    return {
        "seconds": seconds,
        "bytes": 2 * weights + held + (COPIES - 1) * max(sizes, default=0) + 8 * FLOAT64_COPIES * widest + activations,
        "activations": activations,
        "disk": 0 if blocks or sum(sizes) > size_limit() else sum(sizes),
    }


@contextmanager
def _largest(model: nn.Module) -> Iterator[list[int]]:
    """Inside, the list's only number is the most bytes that a layer's inputs and outputs took together."""
    largest = [0]

    def look(module: nn.Module, given: Any, output: Any) -> None:
        largest[0] = max(largest[0], sum(tensor.nbytes for tensor in tensors_in((given, output))))

    with attached([m.register_forward_hook(look) for m in model.modules() if not any(True for _ in m.children())]):
        yield largest
