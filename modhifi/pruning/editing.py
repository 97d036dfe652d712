"""New weights for the readers of removed components: compensate, write them, give the mean back."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi.calibration.moments import Moments
from modhifi.errors import IndefiniteError
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.local_error import local_error
from modhifi.pruning.readers import applied_second, second_of
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.depth import inside, removed_parts
from modhifi.structure.groups import Structure
from modhifi.structure.operators import absorb_mean, kernel_size, weight_matrix, write_weight
from modhifi.structure.places import operator_at
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import removed_positions


@dataclass(frozen=True)
class LayerError:
    """Squared local error of one reader's output and its energy, both expected per row on the calibration data."""

    reader: str
    error: float
    energy: float

    @property
    def relative(self) -> float:
        return self.error / self.energy if self.energy > 0 else 0.0


def edit_readers(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    later: Container[str] = (),
) -> tuple[LayerError, ...]:
    """Write compensated weights, zero in the removed columns, into every reader of a removed component, in place.

    Shapes stay. Biases, or the running mean of the BatchNorm behind, take the change of the mean. The readers ``later``
    stay as they are.
    """
    return tuple(
        edit_reader(model, structure, name, positions, moments[name], settings)
        for name, positions in edited_readers(structure, plan).items()
        if name not in later
    )


def edited_readers(structure: Structure, plan: Plan) -> dict[str, Tensor]:
    """The input channels, int64, that every reader outside the removed blocks and sublayers loses."""
    parts, removed = removed_parts(structure, plan), removed_positions(structure, plan)
    return {name: at for (name, role), at in removed.items() if role == "reader" and not inside(name, parts)}


def edit_reader(
    model: nn.Module, structure: Structure, name: str, positions: Tensor, moments: Moments, settings: PruneSettings
) -> LayerError:
    """Compensate one reader for the loss of some input channels (``positions``), in place."""
    weight = write_compensated(model, structure, name, positions, moments, settings)
    edited = weight_matrix(operator_at(model, name))  # rounded to the model's type
    measured = second_of(moments, structure.operators[name].sink)
    pairs = [local_error(weight[g], edited[g], measured[g]) for g in range(len(weight))]
    errors, energies = zip(*pairs, strict=True)
    return LayerError(name, sum(errors), sum(energies))


def write_compensated(
    model: nn.Module, structure: Structure, name: str, positions: Tensor, moments: Moments, settings: PruneSettings
) -> Tensor:
    """What :func:`edit_reader` writes, without its error; returns the weights before, float64 ``(G, o, d)``."""
    edited = compensated(model, structure, name, positions, moments, settings)
    return store(model, structure, name, edited, moments, settings)


def store(
    model: nn.Module, structure: Structure, name: str, edited: Tensor, moments: Moments, settings: PruneSettings
) -> Tensor:
    """Write a reader's new weights ``(G, o, d)`` and, compensating, give its mean back; returns the old ones."""
    weight, sink = weight_matrix(operator_at(model, name)), structure.operators[name].sink
    write_weight(operator_at(model, name), edited)
    if COMPENSATIONS[settings.compensate].restores_mean and sink is not None:
        absorb_mean(model, name, sink, torch.bmm(weight - edited, moments.mean[:, :, None]).flatten())
    return weight


def compensated(
    model: nn.Module, structure: Structure, name: str, positions: Tensor, moments: Moments, settings: PruneSettings
) -> Tensor:
    """A reader's weights after the loss of some input channels, float64 ``(G, o, d)``; nothing is written."""
    module = operator_at(model, name)
    weight = weight_matrix(module)
    groups, _, columns = weight.shape
    kernel = kernel_size(module)
    second = applied_second(moments, structure.operators[name].sink)
    channels = torch.ones(groups * columns // kernel, dtype=torch.bool)
    channels[positions] = False
    kept = channels.view(groups, -1).to(weight.device)
    blocks = torch.arange(columns, device=weight.device).view(-1, kernel)
    edit = COMPENSATIONS[settings.compensate].edit
    try:
        parts = [edit(weight[g], second[g], blocks, kept[g], settings.ridge) for g in range(groups)]
    except IndefiniteError:
        raise IndefiniteError(structure.read_by(name)) from None
    return torch.stack(parts)
