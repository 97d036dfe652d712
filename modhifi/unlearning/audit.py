"""Attack a model that was made to forget, beside the original and beside a model whose output was merely closed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.calibration.prefix_cache import Passes
from modhifi.data.labels import class_name, populations
from modhifi.data.samples import Samples
from modhifi.models.hooks import only_input
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.structure.tracing.branches import Calls
from modhifi.unlearning import attacks
from modhifi.unlearning.audit_text import conclude
from modhifi.unlearning.batchnorm import batch_norms, recall, settle_norms
from modhifi.unlearning.data import UnlearnData
from modhifi.unlearning.edit import UnlearnSettings, forget, settled_names
from modhifi.unlearning.sites import Sites, Writer

SHOTS = 10
# What each row measures on test images, as shares; `forgotten` ones are of the forgotten classes alone.
MEASURES = {
    "forget": "accuracy on forgotten classes",
    "retain": "accuracy on the others",
    "worst_loss": "largest loss of one retained class",
    "recall": "forgotten classes after BatchNorm re-estimation",
    "recall_plain": "the same before the norms were settled",
    "probe": "forgotten classes by a linear probe",
    "probe_retain": "the others by the same probe",
    "nearest_mean": "forgotten classes by nearest class mean",
    "neighbours": f"forgotten classes by {attacks.NEIGHBOURS} nearest neighbours",
    "original_head": "forgotten classes by the original head on these features",
    "relearn": f"forgotten classes by {SHOTS}-shot prototypes",
    "membership": "membership AUC on forgotten classes",
}


@dataclass(frozen=True)
class Observed:
    """One pass over a set: logits ``(n, classes)``, what the classifier reads ``(n, d)``, pooled streams by block."""

    logits: Tensor
    features: Tensor
    streams: Mapping[str, Tensor]


@torch.no_grad()
def observe(loaded: LoadedModel, model: nn.Module, sites: Sites, samples: Samples, batch_size: int) -> Observed:
    """Run a model of the sites' architecture and keep its logits, features and streams (mean over positions)."""
    last: dict[str, Writer] = {writer.site.block: writer for writer in sites.writers}
    streams: dict[str, list[Tensor]] = {block: [] for block in last}
    features: list[Tensor] = []
    count = 0

    def pool(block: str, stream: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            rows = last[block].rows
            rows = rows[rows[:, 0] >= 0]
            if sites.focus is not None and last[block].joined and int(sites.focus.max()) < len(rows):
                rows = rows[sites.focus]
            flat = stream.detach().reshape(count, -1)
            streams[block].append(flat[:, rows.to(flat.device)].float().mean(1).cpu())

    handles: list[Any] = [
        model.get_submodule(sites.heads[0]).register_forward_pre_hook(
            lambda _, args, named: features.append(only_input(args, named).detach().flatten(1).float().cpu()),
            with_kwargs=True,
        )
    ]
    calls = Calls({writer.call: partial(pool, block) for block, writer in last.items()})
    logits = []
    try:
        for first, run in Passes(loaded, model, samples, batch_size):
            count = min(batch_size, len(samples) - first)
            with calls:
                out = run()
            logits.append(out.float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    joined = {block: torch.cat(parts) for block, parts in streams.items()}
    return Observed(torch.cat(logits), torch.cat(features), joined)


def changed_operators(original: nn.Module, edited: nn.Module) -> list[str]:
    """The modules with a weight that differs between two models of one architecture, norms left out."""
    norms, theirs = set(batch_norms(original)), dict(edited.named_parameters())
    names = {name.rpartition(".")[0] for name, p in original.named_parameters() if not torch.equal(p, theirs[name])}
    return sorted(names - norms)


def head_mask(
    loaded: LoadedModel, edited: nn.Module, sites: Sites, data: UnlearnData, classes: Sequence[int], batch_size: int
) -> tuple[nn.Module, nn.Module]:
    """The control, the original with closed outputs: norms settled where the edited model's are, and as they were."""
    settings = UnlearnSettings(method="head-mask", settle=False, batch_size=batch_size)
    plain = forget(loaded, sites, data.edit, data.groups, settings, classes).model
    changed = [name for name in changed_operators(loaded.model, edited) if name in {s.module for s in sites.readers}]
    settled = copy.deepcopy(plain)
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
) -> dict[str, Any]:
    """Measure ``edited``, the original (``loaded``), the head-mask control and, if given, a retrained ``reference``.

    ``plain``: the edited model before its norms were settled, where it is known. ``members``: training images of the
    forgotten classes, for the membership attack. Returns JSON-able ``rows`` (model by model, :data:`MEASURES`; None
    was not measured), ``blocks`` (the probe block by block), ``classes``, ``moved``, ``verdict`` and ``conclusion``.
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
    seen: dict[str, tuple[Observed, Observed]] = {}
    for number, (name, (owner, model, own_sites, unsettled)) in enumerate(candidates.items()):
        fit = observe(owner, model, own_sites, data.fit, batch_size)
        test = observe(owner, model, own_sites, data.test, batch_size)
        seen[name] = fit, test
        original_head = None if name == "reference" else (loaded.model, sites)
        row = measure(data, classes, fit, test, seen["original"][1], original_head, earlier)
        row |= recalls(owner, model, unsettled, data, classes, earlier, batch_size)
        row["membership"] = None if members is None else _membership(owner, model, members, data, classes, batch_size)
        rows[name] = row
        progress("attacking", number + 1, len(candidates))
    table = _classes(loaded, data, seen)
    verdict, text = conclude(rows, [class_name(loaded, c) for c in classes])
    return {
        "forgotten": [class_name(loaded, c) for c in classes],
        "rows": rows,
        "blocks": _blocks(data, classes, earlier, seen),
        "classes": table,
        "moved": [_moved(loaded, c, data, seen["edited"][1].logits) for c in classes],
        "verdict": verdict,
        "conclusion": text,
        "test_samples": len(data.test),
        "fit_samples": len(data.fit),
    }


def _labels(samples: Samples) -> Tensor:
    assert samples.labels is not None
    return samples.labels


def _share(predicted: Tensor, labels: Tensor, chosen: Tensor) -> float:
    return float((predicted[chosen] == labels[chosen]).double().mean())


def measure(
    data: UnlearnData,
    classes: Sequence[int],
    fit: Observed,
    test: Observed,
    base: Observed,
    original_head: tuple[nn.Module, Sites] | None,
    earlier: Sequence[int] = (),
) -> dict[str, float | None]:
    """The measures of one model that need no further pass; ``base`` is what the original gives on the test set."""
    y, y_fit = _labels(data.test), _labels(data.fit)
    group, group_fit = populations(data.test, classes, earlier), populations(data.fit, classes, earlier)
    gone, kept = group > 0, group == 0
    predicted, before = test.logits.argmax(1), base.logits.argmax(1)
    losses = [
        _share(before, y, kept & (y == c)) - _share(predicted, y, kept & (y == c)) for c in y[kept].unique().tolist()
    ]
    used = group_fit >= 0
    a, labels = fit.features[used], y_fit[used]
    probe = attacks.linear_probe(a, labels, test.features)
    # Over the classes that stay: a closed output has no probability that a logarithm could be taken of.
    stay = [c for c in range(base.logits.shape[1]) if c not in (*classes, *earlier)]
    log_p, log_q = (o.logits[kept][:, stay].double().log_softmax(1) for o in (base, test))
    return {
        "forget": _share(predicted, y, gone),
        "retain": _share(predicted, y, kept),
        "worst_loss": max(losses),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(1).mean()),
        "probe": _share(probe, y, gone),
        "probe_retain": _share(probe, y, kept),
        "nearest_mean": _share(attacks.nearest_mean(a, labels, test.features), y, gone),
        "neighbours": _share(attacks.nearest_neighbours(a, labels, test.features), y, gone),
        "original_head": None if original_head is None else _original_head(*original_head, test.features, y, gone),
        "relearn": _share(attacks.relearn(a, labels, test.features, list(classes), SHOTS), y, gone),
    }


def recalls(
    loaded: LoadedModel,
    model: nn.Module,
    unsettled: nn.Module | None,
    data: UnlearnData,
    classes: Sequence[int],
    earlier: Sequence[int],
    batch_size: int,
) -> dict[str, float | None]:
    """Accuracy on the forgotten classes once BatchNorm is re-estimated on retained images, settled norms or not."""
    retained = data.fit.subset(torch.nonzero(populations(data.fit, classes, earlier) == 0).flatten())
    result: dict[str, float | None] = {}
    for key, variant in (("recall", model), ("recall_plain", unsettled)):
        again = None if variant is None else recall(loaded, variant, retained, batch_size)
        result[key] = None if again is None else _forget_accuracy(loaded, again, data, classes, batch_size)
    return result


def _original_head(model: nn.Module, sites: Sites, features: Tensor, y: Tensor, gone: Tensor) -> float:
    head: Any = model.get_submodule(sites.heads[0])
    weight = head.weight.detach().flatten(1).float().cpu()
    weight = weight if weight.shape[1] == features.shape[1] else weight.T
    bias = 0.0 if head.bias is None else head.bias.detach().float().cpu()
    return _share((features @ weight.T + bias).argmax(1), y, gone)


def _forget_accuracy(
    loaded: LoadedModel, model: nn.Module, data: UnlearnData, classes: Sequence[int], batch_size: int
) -> float:
    gone = torch.nonzero(populations(data.test, classes) > 0).flatten()
    part = data.test.subset(gone)
    predicted = torch.cat([run().argmax(1).cpu() for _, run in Passes(loaded, model, part, batch_size)])
    return float((predicted == _labels(part)).double().mean())


def _membership(
    loaded: LoadedModel, model: nn.Module, members: Samples, data: UnlearnData, classes: Sequence[int], batch_size: int
) -> float:
    def scores(samples: Samples) -> Tensor:
        part = samples.subset(torch.nonzero(populations(samples, classes) > 0).flatten())
        logits = torch.cat([run().float().cpu() for _, run in Passes(loaded, model, part, batch_size)])
        return logits.double().log_softmax(1).gather(1, _labels(part)[:, None])[:, 0]

    return attacks.auc(scores(members), scores(data.test))


def _classes(
    loaded: LoadedModel, data: UnlearnData, seen: Mapping[str, tuple[Observed, Observed]]
) -> list[dict[str, Any]]:
    y = _labels(data.test)
    return [
        {"class": class_name(loaded, c), "n": int((y == c).sum())}
        | {name: _share(test.logits.argmax(1), y, y == c) for name, (_, test) in seen.items()}
        for c in y.unique().tolist()
    ]


def _moved(loaded: LoadedModel, index: int, data: UnlearnData, logits: Tensor) -> dict[str, Any]:
    predicted = logits.argmax(1)[_labels(data.test) == index]
    counts = predicted.bincount(minlength=logits.shape[1])
    top = counts.argsort(descending=True, stable=True)[:5].tolist()
    to = {class_name(loaded, c): float(counts[c] / len(predicted)) for c in top if counts[c] > 0}
    return {"class": class_name(loaded, index), "to": to}


def _blocks(
    data: UnlearnData, classes: Sequence[int], earlier: Sequence[int], seen: Mapping[str, tuple[Observed, Observed]]
) -> list[dict[str, Any]]:
    """The probe's recall of the forgotten classes at every stream, block by block."""
    y, y_fit = _labels(data.test), _labels(data.fit)
    gone, used = populations(data.test, classes) > 0, populations(data.fit, classes, earlier) >= 0
    result: list[dict[str, Any]] = []
    for block in seen["original"][0].streams:
        entry: dict[str, Any] = {"block": block}
        for name, (fit, test) in seen.items():
            if block in fit.streams:
                found = attacks.linear_probe(fit.streams[block][used], y_fit[used], test.streams[block])
                entry[name] = _share(found, y, gone)
        result.append(entry)
    return result
