"""Groups that cannot be measured or solved: which they are, why, and which sample is to blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.hooks import attached, batch_statistics, on_input
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.linalg import diagonals
from modhifi.pruning.readers import second_of
from modhifi.structure.groups import Structure
from modhifi.structure.places import operator_at
from modhifi.structure.stacked import Stacked

UNFOLLOWED = (
    "once it is cut, the model computes something else on the samples than with its components masked, or fails: its "
    "code counts on them, or takes a branch there"
)
UNSOLVED = "the Gram matrix of what reads it has no factorisation, even with strong damping"


def leave(structure: Structure, reasons: Mapping[str, str], strict: bool) -> Structure:
    """The structure with some groups refused, each for its reason.

    Raises ModhifiError with ``strict``, and where no group is left.
    """
    if not reasons:
        return structure
    name, reason = next(iter(reasons.items()))
    if strict:
        raise ModhifiError(f"the group '{name}' cannot be pruned: {reason}; --exclude it, or leave out --strict")
    structure = structure.leave(reasons)
    if not structure.prunable:
        raise ModhifiError(f"no group can be pruned; of {len(reasons)}, '{name}': {reason}")
    return structure


def unmeasured(
    loaded: LoadedModel, structure: Structure, moments: Mapping[str, Moments], samples: Samples, batch_size: int
) -> dict[str, str]:
    """The groups whose readers never ran, or read numbers whose products overflow, each with the reason.

    Raises ModhifiError, naming sample, layer and group, where what a layer reads is not finite.
    """
    reasons, overflowing, finite = {}, [], _finite(moments)
    for group in structure.prunable:
        for piece in group.readers:
            if piece.module not in moments:
                reasons[group.name] = f"its reader '{piece.module}' was never run on the calibration data"
            elif not finite[piece.module]:
                reasons[group.name] = f"the squares of what its reader '{piece.module}' reads overflow"
                overflowing.append(piece.module)
    if overflowing:
        _refuse_broken(loaded, structure, samples, batch_size)
    return reasons


def _finite(moments: Mapping[str, Moments]) -> dict[str, bool]:
    """Which moments are finite; by the Cauchy-Schwarz inequality the diagonal tells."""
    peaks = [diagonals(second_of(m, "bias")).amax() + m.mean.abs().amax() for m in moments.values()]
    finite = torch.stack([peak.to(peaks[0].device) for peak in peaks]).isfinite().tolist() if peaks else []
    return dict(zip(moments, finite, strict=True))


@torch.no_grad()
def _refuse_broken(loaded: LoadedModel, structure: Structure, samples: Samples, batch_size: int) -> None:
    """Run the samples again, and raise ModhifiError at the first number that is not finite."""
    at: dict[str, list[int]] = {}

    def look(module: str, x: Tensor) -> None:
        if x.is_floating_point() and not at:
            bad = ~x.isfinite().reshape(len(x), -1).all(1)
            if bool(bad.any()):
                at[module] = bad.nonzero().flatten().tolist()

    names = dict.fromkeys(piece.module for group in structure.prunable for piece in group.readers)
    layers = {name: operator_at(loaded.model, name) for name in names}
    plain = {name: layer for name, layer in layers.items() if not isinstance(layer, Stacked)}
    handles = [on_input(layer, partial(look, name)) for name, layer in plain.items()]
    with attached(handles):
        for few in _few_at_a_time(samples, batch_size):
            batch = next(few.batches(batch_size))
            refuse_broken_items(batch, few.names)
            with batch_statistics(loaded.model, few.adapted):
                loaded.run(batch)
            for module, rows in at.items():
                group = next(g.name for g in structure.prunable if any(p.module == module for p in g.readers))
                where = few.names[rows[0] if rows[0] < len(few) else 0]
                half = next(loaded.model.parameters()).dtype == torch.float16
                advice = "give the model in bfloat16 or float32" if half else "check the weights in front of it"
                raise ModhifiError(
                    f"what the layer '{module}' of the group '{group}' reads is not finite on sample '{where}'; "
                    f"{advice}"
                )


def _few_at_a_time(samples: Samples, size: int) -> Iterator[Samples]:
    """The samples of every source in order, at most ``size`` in one piece."""
    for _, source in samples.by_source():
        for start in range(0, len(source), size):
            yield source.subset(range(start, min(start + size, len(source))))


def refuse_broken_items(batch: Tensor, names: tuple[str, ...]) -> None:
    """Raise ModhifiError that names the first item of a batch with NaN or infinite values."""
    if batch.is_floating_point():
        bad = ~batch.isfinite().reshape(len(batch), -1).all(1)
        if bool(bad.any()):
            name = names[int(bad.nonzero()[0])]
            raise ModhifiError(f"sample '{name}' holds NaN or infinite values; repair it or leave it out")
