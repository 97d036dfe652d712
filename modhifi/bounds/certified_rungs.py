"""The rungs that are certified, or measured layer by layer, in float64 on a few samples: R1, R2 and R4.

R1 and R2 are form B: errors of the modified layers on clean activations, behind them the modified tails.
Source: docs/method.md, the error bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi.bounds.certified import OUTPUT_SLACK, Certified, certify, in_parts, logits_of
from modhifi.bounds.deadline import Deadline, OutOfTime
from modhifi.bounds.held_out import HeldOut
from modhifi.bounds.propagation.newton import ROUNDS
from modhifi.bounds.telescoping import LayerShare, hybrid_changes
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.structure.clone import clone

# For larger models the float64 passes take longer than the pruning itself.
WALKED_PARAMETERS = 10_000_000
# What the certified rungs may take that nobody asked for: a share of the run, or so many seconds of a short one.
SHARE, PATIENCE = 1 / 10, 30.0
CERTIFIED = ("R1 theorem form", "R1 every input", "R2 certified-local", "R4 measured")


@dataclass(frozen=True)
class Rung:
    """One figure of the ladder.

    ``value`` is a Euclidean change of the output unless the name says otherwise; None, with the reason in ``note``,
    where it is not available. ``informative``: below the error of the mean output.
    """

    name: str
    value: float | None
    informative: bool
    assumption: str
    note: str = ""


@dataclass(frozen=True)
class Walked:
    """The certified rungs on ``count`` samples; ``left_out`` says why they were not worth their time."""

    rungs: tuple[Rung, ...]
    layers: tuple[LayerShare, ...] = ()
    gap: float | None = None
    violations: tuple[str, ...] = ()
    every_input: float | None = None
    count: int = 0
    left_out: str = ""


def certified_rungs(
    original: LoadedModel,
    edited: nn.Module,
    dense_shape: nn.Module | None,
    held: Samples,
    table: HeldOut,
    walked: int | None,
    unsteady: str,
    allowed: float,
) -> Walked:
    """The certified rungs, where they can be had in the ``allowed`` seconds of processor time."""
    size = sum(p.numel() for p in original.model.parameters())
    if walked is None:
        walked = 0 if size > WALKED_PARAMETERS else 1 if table.sequences else 16
    count = min(len(held), walked)
    left_out = "" if count else f"no sample was walked in float64 through {size:,} parameters; ask with --walked N"
    reason = unsteady or ("the edited model is not known in the original's shapes" if dense_shape is None else "")
    if not reason and not left_out and dense_shape is not None:
        try:
            with Deadline(allowed):
                walk = _walk(original, edited, dense_shape, held, table, count)
        except OutOfTime:
            left_out = f"they take longer than {allowed:.0f} s, a tenth of the run; ask with --walked N"
        else:
            if walk is not None:
                return walk
            reason = "the edited model could not be rebuilt in the original's shapes"
    rungs = tuple(Rung(name, None, False, "not available", reason or left_out) for name in CERTIFIED)
    return Walked(rungs, left_out="" if reason else left_out)


def _walk(
    original: LoadedModel, edited: nn.Module, dense_shape: nn.Module, held: Samples, table: HeldOut, count: int
) -> Walked | None:
    """The certified rungs on the first ``count`` samples; None where ``dense_shape`` is another function."""
    original64, edited64 = _double(original.model), _double(dense_shape)
    batch = torch.stack([held.load(i) for i in range(count)])
    batch = batch.double() if batch.is_floating_point() else batch
    try:
        if not _same_function(original, edited, edited64, batch[:2]):
            return None
    except RuntimeError:
        return None
    certified = certify(original, original64, edited64, batch)
    edits = [p for _, p, _, _ in certified.layers]
    parts = in_parts(batch)
    changes, after, before = hybrid_changes(original64, edited64, edits, lambda x, m: logits_of(original, m, x), parts)
    telescoped = torch.stack(changes).sum(0) if changes else torch.zeros_like(after)
    gap = float((telescoped - (after - before)).abs().max())
    layers = tuple(
        _share(where, names, error, constant, change)
        for (where, names, error, constant), change in zip(certified.layers, changes, strict=True)
    )
    violations = certified.violations()
    limit = OUTPUT_SLACK * certified.scale
    if gap > limit:
        violations += (f"the telescoped differences miss the whole change by {gap:.3g}",)
    if float((after - certified.outputs).abs().max()) > limit:
        violations += ("undoing every modified layer does not give back the original",)
    rungs = _rungs_of(certified, table.constant.error, original.gives_values)
    return Walked(rungs, layers, gap, violations, certified.every_input, count)


def _rungs_of(certified: Certified, constant_error: float, values: bool) -> tuple[Rung, ...]:
    def rung(name: str, value: float | None, assumption: str, key: str) -> Rung:
        value = None if value is None or not math.isfinite(value) else value
        note = "" if value is not None else certified.missing.get(key, "the constants overflow")
        return Rung(name, value, value is not None and value < constant_error, assumption, note)

    n = len(certified.measured)
    unflippable = "" if values else f"; {100 * certified.cannot_flip:.3g} % of them proven not to flip"
    return (
        rung(
            "R1 every input",
            certified.every_input,
            "global constants, operator norms of the edit, the whole input box; holds for every input",
            "every input",
        ),
        rung(
            "R1 theorem form",
            certified.expected,
            f"global constants of the modified tails times errors measured on {n} samples; root mean square over them",
            "R1",
        ),
        rung(
            "R2 certified-local",
            _rms(certified.local),
            f"{ROUNDS} rounds of Newton's method from the clean activations "
            f"of {n} samples, plus a certified remainder ({_rms(certified.remainder):.3g}); "
            f"root mean square over them{unflippable}",
            "R2",
        ),
        rung("R4 measured", _rms(certified.measured), f"measured on {n} samples, root mean square; no guarantee", "R4"),
    )


def _share(where: str, names: tuple[str, ...], error: float, constant: float, change: Tensor) -> LayerShare:
    moved = _rms(change.flatten(1).norm(dim=1))
    amplification = math.nan if math.isnan(error) else moved / error if error > 0 else 0.0
    return LayerShare(where, names, error, moved, amplification, constant)


def _double(model: nn.Module) -> nn.Module:
    return clone(model).cpu().double()


def _same_function(original: LoadedModel, edited: nn.Module, dense_shape: nn.Module, batch: Tensor) -> bool:
    outputs = logits_of(original, _double(edited), batch)
    expected = logits_of(original, dense_shape, batch)
    return float((outputs - expected).norm()) <= 1e-6 * float(expected.norm())


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if len(values) else 0.0
