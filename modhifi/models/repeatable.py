"""Does a model give the same outputs for the same inputs? Whatever is measured or bounded of it takes that as given."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.models.loaded import LoadedModel
from modhifi.structure.outputs import difference


@torch.no_grad()
def unrepeatable(loaded: LoadedModel) -> str | None:
    """How two passes of a model on its example differ, in a sentence; None where they do not, up to rounding.

    Its buffers are as they were afterwards.
    """
    before = {name: buffer.clone() for name, buffer in loaded.model.named_buffers()}
    first = {name: output.clone() for name, output in loaded.outputs(loaded.example).items()}
    second = loaded.outputs(loaded.example)
    changed = []
    for name, buffer in loaded.model.named_buffers():
        if name in before and not _same(buffer, before[name]):
            changed.append(name)
            buffer.copy_(before[name])
    wrong = next((name for name, output in first.items() if not _agree(output, second.get(name), not changed)), None)
    if wrong is None and first.keys() == second.keys():
        return None
    where = f" in output '{wrong}'" if wrong else ""
    cause = (
        f"its buffer '{changed[0]}' changes at every pass"
        if changed
        else "it draws at random, or keeps something from pass to pass"
    )
    return f"two passes of {loaded.source} on one batch differ{where}: {cause}; figures hold for one pass only"


def _same(buffer: Tensor, before: Tensor) -> bool:
    return buffer.shape == before.shape and bool(((buffer == before) | (buffer.isnan() & before.isnan())).all())


def _agree(output: Tensor, other: Tensor | None, rounded: bool) -> bool:
    """To the bit, or up to the order in which a GPU adds: half of the digits of a type, 1 % for half precision."""
    if other is None or output.shape != other.shape:
        return False
    inexact = rounded and (output.is_floating_point() or output.is_complex())
    return difference(other, output) <= (min(torch.finfo(output.dtype).eps ** 0.5, 0.01) if inexact else 0.0)
