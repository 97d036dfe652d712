"""The ladder of bounds on the change of an edited model's outputs, each rung with its assumption.

R1 and R2 are form B: errors of the modified layers on clean activations, behind them the modified tails. They and R4
are computed in float64 on the first held-out units, R3 on all of them in the models' own type.
Source: docs/method.md, the error bound; docs/bounds.md says how to read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.bounds.certified import OUTPUT_SLACK, Certified, certify, in_parts, logits_of
from modhifi.bounds.held_out import HeldOut, tabulate
from modhifi.bounds.propagation.newton import ROUNDS
from modhifi.bounds.statistical import Forgetting, Statistical, forgetting, statistical
from modhifi.bounds.telescoping import LayerShare, hybrid_changes
from modhifi.bounds.verdicts import Tolerances, Verdict, enforce, forgetting_verdict, judge, self_test, unsettled
from modhifi.data.labels import populations
from modhifi.data.samples import Samples
from modhifi.disk import jsonable
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.models.trial import unrepeatable
from modhifi.progress import Progress, silent
from modhifi.structure.clone import clone

# For larger models the float64 passes take longer than the pruning itself.
WALKED_PARAMETERS = 10_000_000


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
class BoundReport:
    """The whole ladder of bounds and its verdicts.

    ``layers`` holds the change that each modified layer causes (R4), ``telescoping_gap`` by how much their sum misses
    the whole change. ``constant_error`` is the root mean square error of a predictor that always outputs the mean
    output: a bound above it is vacuous.
    """

    rungs: tuple[Rung, ...]
    layers: tuple[LayerShare, ...]
    telescoping_gap: float | None
    constant_error: float
    verdicts: tuple[Verdict, ...]
    statistical: Statistical
    tolerances: Tolerances
    warnings: tuple[str, ...]
    # Of the original and the edited model, where classes were forgotten; the other fields then tell of the others.
    forgetting: Mapping[str, Forgetting] | None = None
    # Whether the outputs are features, of which a largest one means nothing.
    features: bool = False

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able data: ``verdicts`` for the report's table, everything else under ``bounds``."""
        content: dict[str, Any] = jsonable(asdict(self))
        verdicts = [v for v in content.pop("verdicts")]
        for rung in self.rungs:
            verdict = "not available" if rung.value is None else "INFORMATIVE" if rung.informative else "VACUOUS"
            value = "" if rung.value is None else f"{rung.value:.4g}; "
            text = f"{value}{rung.assumption}" + (f" ({rung.note})" if rung.note else "")
            verdicts.append({"name": rung.name, "verdict": verdict, "text": text})
        if self.forgetting is None:
            del content["forgetting"]
        else:
            verdicts.append(forgetting_verdict(self.forgetting["original"], self.forgetting["edited"]))
        return {"verdicts": verdicts, "bounds": content}

    def enforce(self) -> None:
        """Raises SelfTestFailed (exit code 3) or GateFailed (exit code 1) where a verdict asks for it."""
        enforce(self.verdicts)


def verify_model(
    original: LoadedModel,
    edited: nn.Module,
    dense_shape: nn.Module | None,
    held: Samples,
    tolerances: Tolerances | None = None,
    *,
    walked: int | None = None,
    batch_size: int = 32,
    table: HeldOut | None = None,
    progress: Progress = silent,
) -> BoundReport:
    """Computes every rung for ``edited``, made from ``original.model``, on held-out samples that calibrated nothing.

    ``dense_shape`` is the function of ``edited`` in the original's shapes, with zero columns for removed components;
    without it R1, R2 and R4 are not available. ``walked`` is their number of samples (default: 16 images, 1 text, none
    of models of more than ``WALKED_PARAMETERS``). ``table`` holds the outputs of both on ``held``, where it is known.
    Nothing is certified and no tolerance passes where two passes of the original on one batch differ. Raises
    ModhifiError for models in train mode and outputs that are not finite (GateFailed for the edited model's).
    """
    tolerances = tolerances or Tolerances()
    tolerances.fit(original.kind)
    for name, model in (("original", original.model), ("edited", edited)):
        if any(m.training for m in model.modules()):
            raise ModhifiError(f"the {name} model is in train mode, where outputs are random; call .eval() first")
    progress("bounding", 0, 3)
    unsteady = unrepeatable(original, held.first())
    if table is None:
        table = tabulate(original, edited, held, batch_size)
    r3 = statistical(table, tolerances.alpha, _population(table, held), tolerances.max_perplexity_ratio)
    progress("bounding", 1, 3)
    rungs, layers, gap, violations, every_input, count = _certify(
        original, edited, dense_shape, held, table, walked, unsteady or ""
    )
    progress("bounding", 3, 3)
    judged = judge(tolerances, r3, table, every_input)
    if unsteady is not None:
        judged = tuple(unsettled(verdict, unsteady) for verdict in judged)
    verdicts = (self_test(violations, count), *judged)
    warnings = [] if unsteady is None else [unsteady]
    if held.sources:
        shares = ", ".join(f"{source.name} {source.share:.3g}" for source in held.sources)
        warnings.append(f"the held-out data is a mixture ({shares}): the statistical bounds speak of that mixture only")
    elif held.synthetic:
        warnings.append("the held-out data is synthetic: the statistical bounds speak of synthetic data only")
    if held.units is not None and (documents := len(set(held.units))) < len(held):
        warnings.append(
            f"the {len(held)} held-out windows come from {documents} documents: the statistical bounds take them as "
            "independent, which neighbours in one document are not"
        )
    return BoundReport(
        rungs=(*rungs, *_statistical_rungs(r3)),
        layers=layers,
        telescoping_gap=gap,
        constant_error=table.constant.error,
        verdicts=verdicts,
        statistical=r3,
        tolerances=tolerances,
        warnings=tuple(warnings),
        features=original.gives_features,
    )


def verify_unlearned(
    original: LoadedModel,
    edited: nn.Module,
    dense_shape: nn.Module | None,
    held: Samples,
    classes: Sequence[int],
    tolerances: Tolerances | None = None,
    *,
    earlier: Sequence[int] = (),
    walked: int | None = None,
    batch_size: int = 32,
    progress: Progress = silent,
) -> BoundReport:
    """Computes the ladder on labelled samples of the retained classes, and how often ``classes`` are still predicted.

    ``earlier`` classes, forgotten before, belong to neither. Raises ModhifiError as :func:`verify_model` does, and
    where no sample of one of the two kinds is among them.
    """
    population = populations(held, classes, earlier)
    retained, forgotten = (held.subset(torch.nonzero(w).flatten()) for w in (population == 0, population > 0))
    if not len(retained) or not len(forgotten):
        kind = "retained" if not len(retained) else "forgotten"
        raise ModhifiError(f"no held-out image of the {kind} classes; give data that has both, or more --samples")
    report = verify_model(
        original, edited, dense_shape, retained, tolerances, walked=walked, batch_size=batch_size, progress=progress
    )
    table, alpha = tabulate(original, edited, forgotten, batch_size), report.statistical.alpha
    rates = {
        name: forgetting(top, torch.tensor(classes), alpha)
        for name, top in (("original", table.top_before), ("edited", table.top_after))
        if top is not None
    }
    return replace(report, forgetting=rates)


def _population(table: HeldOut, held: Samples) -> str:
    kind = "sequences" if table.sequences else "images"
    if held.sources:
        return f"held-out {kind} of a mixture (it speaks of that mixture only)"
    return f"synthetic {kind} (it speaks of synthetic {kind} only)" if held.synthetic else f"held-out {kind}"


def _certify(
    original: LoadedModel,
    edited: nn.Module,
    dense_shape: nn.Module | None,
    held: Samples,
    table: HeldOut,
    walked: int | None,
    unsteady: str,
) -> tuple[tuple[Rung, ...], tuple[LayerShare, ...], float | None, tuple[str, ...], float | None, int]:
    size = sum(p.numel() for p in original.model.parameters())
    if walked is None:
        walked = 0 if size > WALKED_PARAMETERS else 1 if table.sequences else 16
    count = min(len(held), walked)
    reason = "" if count else f"no sample was walked in float64 through {size:,} parameters; ask with --walked N"
    if dense_shape is None:
        reason = "the edited model is not known in the original's shapes"
    reason = unsteady or reason
    if not reason and dense_shape is not None:
        original64, edited64 = _double(original.model), _double(dense_shape)
        batch = torch.stack([held.load(i) for i in range(count)])
        batch = batch.double() if batch.is_floating_point() else batch
        try:
            same_function = _same_function(original, edited, edited64, batch[:2])
        except RuntimeError:
            same_function = False
        if not same_function:
            reason = "the edited model could not be rebuilt in the original's shapes"
    if reason:
        names = ("R1 theorem form", "R1 every input", "R2 certified-local", "R4 measured")
        return tuple(Rung(n, None, False, "not available", reason) for n in names), (), None, (), None, 0
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
    rungs = _certified_rungs(certified, table.constant.error)
    return rungs, layers, gap, violations, certified.every_input, count


def _certified_rungs(certified: Certified, constant_error: float) -> tuple[Rung, ...]:
    def rung(name: str, value: float | None, assumption: str, key: str) -> Rung:
        value = None if value is None or not math.isfinite(value) else value
        note = "" if value is not None else certified.missing.get(key, "the constants overflow")
        return Rung(name, value, value is not None and value < constant_error, assumption, note)

    n = len(certified.measured)
    unflippable = f"{100 * certified.cannot_flip:.3g} % of them proven not to flip"
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
            f"root mean square over them; {unflippable}",
            "R2",
        ),
        rung("R4 measured", _rms(certified.measured), f"measured on {n} samples, root mean square; no guarantee", "R4"),
    )


def _statistical_rungs(statistics: Statistical) -> tuple[Rung, ...]:
    confidence = f"{100 * (1 - statistics.alpha):.4g} % confidence, each bound by itself"
    basis = f"{statistics.n} independent {statistics.population}, {confidence}"
    figures = {
        "R3 share of flips": statistics.flips,
        "R3 total variation": statistics.variation,
        f"R3 {statistics.quantile:.0%} quantile of the change": statistics.error_quantile,
        "R3 ratio of perplexities": statistics.perplexity,
    }
    rungs = []
    for name, interval in figures.items():
        if interval is None:
            continue
        value = interval.upper if math.isfinite(interval.upper) else None
        note = f"measured {interval.measured:.4g}, at least {interval.lower:.4g}"
        if value is None:
            note += "; too few units for an upper bound"
        rungs.append(Rung(name, value, interval.informative, f"{interval.method}, {basis}", note))
    return tuple(rungs)


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
