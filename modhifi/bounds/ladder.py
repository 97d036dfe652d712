"""The ladder of bounds on the change of an edited model's outputs, each rung with its assumption.

R1 and R2 are form B: errors of the modified layers on clean activations, behind them the modified tails. They and R4
are computed in float64 on the first held-out units, R3 on all of them in the models' own type.
Source: docs/method.md, the error bound; docs/bounds.md says how to read it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.bounds.certified_rungs import PATIENCE, SHARE, Rung, certified_rungs
from modhifi.bounds.held_out import HeldOut, tabulate, tabulate_outputs
from modhifi.bounds.statistical import Forgetting, Statistical, forgetting, statistical
from modhifi.bounds.telescoping import LayerShare
from modhifi.bounds.verdicts import Tolerances, Verdict, enforce, forgetting_verdict, judge, self_test, unsettled
from modhifi.data.labels import populations
from modhifi.data.samples import Samples
from modhifi.disk import jsonable
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.models.trial import one_of_several, unrepeatable
from modhifi.progress import Progress, silent

# What a report calls the items of a kind of model.
NAMES = {"image": "images", "audio": "sounds", "series": "series"}


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
    # Whether the outputs are values, of which a largest one means nothing.
    values: bool = False

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
    spent: float = 0.0,
    progress: Progress = silent,
) -> BoundReport:
    """Computes every rung for ``edited``, made from ``original.model``, on held-out samples that calibrated nothing.

    ``dense_shape`` is the function of ``edited`` in the original's shapes, with zero columns for removed components;
    without it R1, R2 and R4 are not available. ``walked`` is their number of samples (default: 16 images, 1 text, none
    of models of more than ``WALKED_PARAMETERS``, and none where that takes longer than a tenth of the run, which took
    ``spent`` seconds before). ``table`` holds the outputs of both on ``held``, where it is known.
    Nothing is certified and no tolerance passes where two passes of the original on one batch differ. Raises
    ModhifiError for models in train mode and outputs that are not finite (GateFailed for the edited model's).
    """
    tolerances = tolerances or Tolerances()
    tolerances.fit(original)
    for name, model in (("original", original.model), ("edited", edited)):
        if any(m.training for m in model.modules()):
            raise ModhifiError(f"the {name} model is in train mode, where outputs are random; call .eval() first")
    progress("bounding", 0, 3)
    start = time.perf_counter()
    few = held.first()
    unsteady = unrepeatable(original, few)
    if table is None:
        table = tabulate(original, edited, held, batch_size)
    r3 = statistical(table, tolerances.alpha, _population(original, table, held), tolerances.max_perplexity_ratio)
    progress("bounding", 1, 3)
    allowed = math.inf if walked is not None else max(PATIENCE, SHARE * (spent + time.perf_counter() - start))
    walk = certified_rungs(original, edited, dense_shape, held, table, walked, unsteady or "", allowed)
    progress("bounding", 3, 3)
    judged = judge(tolerances, r3, table, walk.every_input)
    if unsteady is not None:
        judged = tuple(unsettled(verdict, unsteady) for verdict in judged)
    compared = any(rung.value is not None for rung in walk.rungs if rung.name.startswith(("R1 theorem", "R2")))
    verdicts = (self_test(walk.violations, walk.count, compared), *judged)
    warnings = [told for told in (unsteady, one_of_several(original, few)) if told is not None]
    if walk.left_out and walked is None:
        warnings.append(f"the certified rungs (R1, R2, R4) are left out: {walk.left_out}")
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
        rungs=(*walk.rungs, *_statistical_rungs(r3, original.gives_values)),
        layers=walk.layers,
        telescoping_gap=walk.gap,
        constant_error=table.spread if original.gives_values else table.constant.error,
        verdicts=verdicts,
        statistical=r3,
        tolerances=tolerances,
        warnings=tuple(warnings),
        values=original.gives_values,
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
    logits: tuple[Tensor, Tensor] | None = None,
    progress: Progress = silent,
) -> BoundReport:
    """Computes the ladder on labelled samples of the retained classes, and how often ``classes`` are still predicted.

    ``earlier`` classes, forgotten before, belong to neither. ``logits`` ``(n, classes)`` are those of both models on
    ``held``, where they are known. Raises ModhifiError as :func:`verify_model` does, and
    where no sample of one of the two kinds is among them.
    """
    population = populations(held, classes, earlier)
    retained, forgotten = (held.subset(torch.nonzero(w).flatten()) for w in (population == 0, population > 0))
    if not len(retained) or not len(forgotten):
        kind = "retained" if not len(retained) else "forgotten"
        raise ModhifiError(f"no held-out image of the {kind} classes; give data that has both, or more --samples")

    def table_of(samples: Samples, chosen: Tensor) -> HeldOut:
        if logits is None:
            return tabulate(original, edited, samples, batch_size)
        before, after = (known[chosen] for known in logits)
        return tabulate_outputs(before, after, samples, batch_size, models=(original.model, edited))

    report = verify_model(
        original,
        edited,
        dense_shape,
        retained,
        tolerances,
        walked=walked,
        batch_size=batch_size,
        table=table_of(retained, population == 0),
        progress=progress,
    )
    table, alpha = table_of(forgotten, population > 0), report.statistical.alpha
    rates = {
        name: forgetting(top, torch.tensor(classes), alpha)
        for name, top in (("original", table.top_before), ("edited", table.top_after))
        if top is not None
    }
    return replace(report, forgetting=rates)


def _population(original: LoadedModel, table: HeldOut, held: Samples) -> str:
    kind = "sequences" if table.sequences or original.reads_tokens else NAMES.get(original.kind, "samples")
    if held.sources:
        return f"held-out {kind} of a mixture (it speaks of that mixture only)"
    return f"synthetic {kind} (it speaks of synthetic {kind} only)" if held.synthetic else f"held-out {kind}"


def _statistical_rungs(statistics: Statistical, values: bool) -> tuple[Rung, ...]:
    confidence = f"{100 * (1 - statistics.alpha):.4g} % confidence, each bound by itself"
    basis = f"{statistics.n} independent {statistics.population}, {confidence}"
    figures = {
        "R3 share of flips": None if values else statistics.flips,
        "R3 total variation": None if values else statistics.variation,
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
