"""Attack a model that was made to forget, beside the original and beside a model whose output was merely closed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.calibration.prefix_cache import Passes
from modhifi.data.labels import class_name, populations
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.structure.clone import clone
from modhifi.unlearning.alike import same_but_for_values
from modhifi.unlearning.attacks import Attacked, attack
from modhifi.unlearning.attacks.base import labels_of, share
from modhifi.unlearning.attacks.linear_probe import linear_probe
from modhifi.unlearning.audit_text import conclude, unrecognised, usable_rows
from modhifi.unlearning.batchnorm import batch_norms, settle_norms, settled_names
from modhifi.unlearning.data import UnlearnData
from modhifi.unlearning.edit import forget
from modhifi.unlearning.observe import Observed, observe, observe_passes
from modhifi.unlearning.settings import UnlearnSettings
from modhifi.unlearning.sites import Sites


@dataclass(frozen=True)
class Audit:
    """What attacks found, and the outputs of the original and of the edited model.

    ``logits`` ``(n, classes)``, float32, are those on the test samples. ``figures`` are JSON-able:
    ``rows`` (model by model, the keys of :func:`modhifi.unlearning.attacks.measures`; None was not measured),
    ``blocks`` (the probe block by block), ``classes``, ``moved``, ``verdict`` and ``conclusion``. ``warnings`` say why
    the figures may mean less than they seem to.
    """

    figures: dict[str, Any]
    logits: tuple[Tensor, Tensor]
    warnings: tuple[str, ...] = ()


def changed_operators(original: nn.Module, edited: nn.Module) -> list[str]:
    """The modules with a weight that differs between two models of one architecture, norms left out."""
    norms, theirs = set(batch_norms(original)), dict(edited.named_parameters(remove_duplicate=False))
    names = {name.rpartition(".")[0] for name, p in original.named_parameters() if not torch.equal(p, theirs[name])}
    return sorted(names - norms)


def _changed_modules(original: nn.Module, copies: Iterable[nn.Module]) -> list[str]:
    """The modules of which any of the copies has another weight or statistic."""
    known, names = original.state_dict(), set[str]()
    for model in copies:
        theirs = model.state_dict()
        names |= {name.rpartition(".")[0] for name, own in known.items() if not torch.equal(own, theirs[name])}
    return sorted(names)


def head_mask(
    loaded: LoadedModel, edited: nn.Module, sites: Sites, data: UnlearnData, classes: Sequence[int], batch_size: int
) -> tuple[nn.Module, nn.Module]:
    """The control, the original with closed outputs: norms settled where the edited model's are, and as they were."""
    settings = UnlearnSettings(method="head-mask", settle=False, batch_size=batch_size)
    plain = forget(loaded, sites, data.edit, data.groups, settings, classes).model
    changed = [name for name in changed_operators(loaded.model, edited) if name in {s.module for s in sites.readers}]
    settled = clone(plain)
    retained = data.edit.subset(torch.nonzero(data.groups == 0).flatten())
    names = settled_names(sites, changed)
    if names:
        settle_norms(Passes(loaded, settled, retained, batch_size), names)
    return settled, plain


@torch.no_grad()
def audit(
    loaded: LoadedModel,
    edited: nn.Module,
    sites: Sites,
    data: UnlearnData,
    classes: Sequence[int],
    *,
    plain: nn.Module | None = None,
    reference: tuple[LoadedModel, Sites] | None = None,
    members: Samples | None = None,
    earlier: Sequence[int] = (),
    batch_size: int = 64,
    progress: Progress = silent,
) -> Audit:
    """Measure ``edited``, the original (``loaded``), the head-mask control and, if given, a retrained ``reference``.

    ``plain``: the edited model before its norms were settled, where it is known. ``members``: training images of the
    forgotten classes, for the membership attack. What the models have in common before the first edit runs once; a
    model that differs from the original in more than its weights runs on its own.
    """
    masked, masked_plain = head_mask(loaded, edited, sites, data, classes, batch_size)
    candidates: dict[str, tuple[LoadedModel, nn.Module, Sites, nn.Module | None]] = {
        "original": (loaded, loaded.model, sites, loaded.model),
        "edited": (loaded, edited, sites, plain),
        "head-mask": (loaded, masked, sites, masked_plain),
    }
    if reference is not None:
        other, other_sites = reference
        candidates["reference"] = (other, other.model, other_sites, other.model)
    rows: dict[str, dict[str, float | None]] = {}
    alike = [
        name
        for name, (owner, model, _, _) in candidates.items()
        if owner is loaded and (model is loaded.model or same_but_for_values(loaded.model, model))
    ]
    copies = [candidates[name][1] for name in alike]
    changed = _changed_modules(loaded.model, copies)
    fits, tests = (_observed(loaded, copies, sites, part, batch_size, changed) for part in (data.fit, data.test))
    observed = dict(zip(alike, zip(fits, tests, strict=True), strict=True))
    for number, (name, (owner, model, own_sites, unsettled)) in enumerate(candidates.items()):
        if name not in observed:
            fit, test = (observe(owner, model, own_sites, part, batch_size) for part in (data.fit, data.test))
            observed[name] = fit, test
        fit, test = observed[name]
        target = Attacked(
            owner,
            model,
            unsettled,
            fit,
            test,
            original_test=observed["original"][1],
            original_head=None if owner is not loaded else loaded.model.get_submodule(sites.heads[0]),
            data=data,
            classes=classes,
            earlier=earlier,
            members=members,
            batch_size=batch_size,
        )
        rows[name] = attack(target)
        progress("attacking", number + 1, len(candidates))
    table = _classes(loaded, data, observed)
    names = [class_name(loaded, c) for c in classes]
    original, changed_outputs = observed["original"][1].logits, observed["edited"][1].logits
    told, warnings = usable_rows(rows, names)
    verdict, text = conclude(told, names)
    figures = {
        "forgotten": names,
        "earlier": [class_name(loaded, c) for c in earlier],
        "rows": rows,
        "blocks": _blocks(data, classes, earlier, observed),
        "classes": table,
        "moved": [_moved(loaded, c, data, changed_outputs) for c in classes],
        "verdict": verdict,
        "conclusion": text,
        "test_samples": len(data.test),
        "fit_samples": len(data.fit),
    }
    warnings = [*unrecognised(figures, original.shape[1]), *warnings]
    return Audit(figures, (original, changed_outputs), tuple(warnings))


def _observed(
    loaded: LoadedModel,
    copies: Sequence[nn.Module],
    sites: Sites,
    samples: Samples,
    batch_size: int,
    changed: Sequence[str],
) -> list[Observed]:
    """What the original, the first of its ``copies``, and the others give; they differ from ``changed`` on."""
    runs = Passes(loaded, copies[0], samples, batch_size, changed)
    seen = [observe_passes(runs, sites)]
    return seen + [observe_passes(runs.of(model), sites, seen[0]) for model in copies[1:]]


def _classes(
    loaded: LoadedModel, data: UnlearnData, observed: Mapping[str, tuple[Observed, Observed]]
) -> list[dict[str, Any]]:
    y = labels_of(data.test)
    return [
        {"class": class_name(loaded, c), "n": int((y == c).sum())}
        | {name: share(test.logits.argmax(1)[y == c], y[y == c]) for name, (_, test) in observed.items()}
        for c in y.unique().tolist()
    ]


def _moved(loaded: LoadedModel, index: int, data: UnlearnData, logits: Tensor) -> dict[str, Any]:
    predicted = logits.argmax(1)[labels_of(data.test) == index]
    counts = predicted.bincount(minlength=logits.shape[1])
    top = counts.argsort(descending=True, stable=True)[:5].tolist()
    to = {class_name(loaded, c): float(counts[c] / len(predicted)) for c in top if counts[c] > 0}
    return {"class": class_name(loaded, index), "to": to}


def _blocks(
    data: UnlearnData, classes: Sequence[int], earlier: Sequence[int], observed: Mapping[str, tuple[Observed, Observed]]
) -> list[dict[str, Any]]:
    """The probe's recall of the forgotten classes at every stream, block by block."""
    y, y_fit = labels_of(data.test), labels_of(data.fit)
    forgotten, used = populations(data.test, classes) > 0, populations(data.fit, classes, earlier) >= 0
    result: list[dict[str, Any]] = []
    for block in observed["original"][0].streams:
        entry: dict[str, Any] = {"block": block}
        for name, (fit, test) in observed.items():
            if block in fit.streams:
                predicted = linear_probe(fit.streams[block][used], y_fit[used], test.streams[block])
                entry[name] = share(predicted[forgotten], y[forgotten])
        result.append(entry)
    return result
