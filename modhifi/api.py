"""The verbs for Python programs: each is one recipe run, with models and data that a program may hold itself.

Every example below is run by the tests, offline, on the model and the images that come with the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi.bounds.ladder import BoundReport, verify_model
from modhifi.bounds.verdicts import Tolerances
from modhifi.calibration.cache import MomentCache
from modhifi.data.in_memory import Data, first_items, source_name
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.skeleton import same_shapes
from modhifi.progress import Progress, silent
from modhifi.pruning.selectors import SELECTORS, Selector
from modhifi.pruning.selectors.base import Order
from modhifi.runs.inputs import Given
from modhifi.runs.prune import PruneResult, run_prune
from modhifi.runs.recipe import parse_recipe
from modhifi.runs.score import GroupScores, score_model
from modhifi.runs.unlearn import UnlearnResult, run_unlearn
from modhifi.runs.unlearn_recipe import parse_unlearn_recipe
from modhifi.runs.verify import held_amounts, verify_artifact

Model = str | Path | nn.Module | LoadedModel
"""``timm:NAME``, ``hf:ORG/NAME[@REVISION]``, ``demo:resnet``, a directory, a module (it is copied), a loaded model."""


def prune(
    model: Model,
    data: Data = "synthetic",
    *,
    ratio: float | None = None,
    params: str | None = None,
    flops: str | None = None,
    kv_cache: str | None = None,
    samples: int | None = None,
    evaluate: Data | None = None,
    evaluation_samples: int | None = None,
    window: int | None = None,
    method: Mapping[str, Any] | None = None,
    checks: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    cache: str | Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    offload: bool = False,
    progress: Progress = silent,
) -> PruneResult:
    """Make a model physically smaller with forward passes only; the one given stays as it is.

    Exactly one budget: ``ratio`` of the components removed, or a share of ``params``, ``flops`` or ``kv_cache`` kept
    (``"0.5x"``).
    ``data``: a source string, samples, or items that you hold: a tensor ``(n, C, H, W)`` of model-ready inputs, a list
    of tensors or PIL images, a map-style Dataset. ``evaluate`` holds out other data; by default it is a disjoint part
    of ``data``. ``window`` is tokens in an item of text; amounts not said are those of `modhifi.runs.defaults`.
    ``method`` and ``checks``: the keys of those parts of a recipe; the result's ``bounds`` answer the checks.
    With ``out`` the artefact is written there. ``cache`` is a directory where moments are kept: a second
    budget then needs no second pass over the data. ``offload``: weights stay in main memory, and one block at a time
    visits the ``device``; a module that accelerate has dispatched to CPU or disk may be given, too.

    Returns the smaller ``model``, a JSON-able ``report``, the ``plan`` and the ``path`` written.
    Raises ModhifiError for bad input, in one line.

    >>> import modhifi
    >>> small = modhifi.prune("demo:resnet", "demo:calibration", ratio=0.3, samples=32, checks={"walked": 0})
    >>> before, after = small.report["size"]["parameters"]
    >>> after < before == 935994
    True
    >>> type(small.model).__module__       # still timm's own class
    'timm.models.resnet'
    """
    loaded = _loaded(model, data)
    recipe = parse_recipe(
        {
            "model": {"name": loaded.source},
            "data": {
                "source": source_name(data),
                "samples": samples,
                "evaluate": None if evaluate is None else source_name(evaluate),
                "evaluation_samples": evaluation_samples,
                "window": window,
            },
            "budget": {"ratio": ratio, "params": params, "flops": flops, "kv_cache": kv_cache},
            "method": dict(method or {}),
            "checks": dict(checks or {}),
            "seed": seed,
            "batch_size": batch_size,
            "offload": offload,
            "out": None if out is None else str(out),
        },
        "modhifi.prune",
    )
    given = Given(loaded, data, evaluate)
    kept = None if cache is None else MomentCache(Path(cache))
    return run_prune(recipe, device=device, given=given, force=force, cache=kept, progress=progress)


def unlearn(
    model: Model,
    data: Data,
    *,
    forget: str | int | Sequence[str | int],
    samples: int = 2000,
    evaluate: Data | None = None,
    evaluation_samples: int = 2000,
    method: str = "erase-writers",
    settings: Mapping[str, Any] | None = None,
    checks: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> UnlearnResult:
    """Make an image classifier forget classes (index or name), then attack the result. No proof of data deletion.

    ``data`` holds forgotten and other classes, with labels or without (the model then labels what it is sure of);
    ``evaluate`` is what the attacks learn from and are tested on. ``settings`` and ``checks``: further keys of those
    parts (``method``, ``checks``) of a recipe.
    Returns the edited ``model``, a JSON-able ``report`` with the audit, and the ``path`` written.
    Raises ModhifiError for bad input, in one line.

    >>> import modhifi
    >>> given = {"evaluate": "demo:test", "method": "erase", "checks": {"walked": 0}}
    >>> found = modhifi.unlearn("demo:resnet", "demo:calibration", forget="frog", **given)
    >>> rows = found.report["audit"]["rows"]
    >>> rows["edited"]["forget"] < 0.1 < 0.8 < rows["edited"]["retain"]
    True
    """
    loaded = _loaded(model, data)
    classes = [forget] if isinstance(forget, str | int) else list(forget)
    recipe = parse_unlearn_recipe(
        {
            "model": {"name": loaded.source},
            "forget": [str(c) for c in classes],
            "data": {
                "source": source_name(data),
                "samples": samples,
                "evaluate": None if evaluate is None else source_name(evaluate),
                "evaluation_samples": evaluation_samples,
            },
            "method": {"name": method, **(settings or {})},
            "checks": dict(checks or {}),
            "seed": seed,
            "batch_size": batch_size,
            "out": None if out is None else str(out),
        },
        "modhifi.unlearn",
    )
    given = Given(loaded, data, evaluate)
    return run_unlearn(recipe, device=device, given=given, force=force, progress=progress)


def score(
    model: Model,
    data: Data = "synthetic",
    *,
    samples: int | None = None,
    window: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> list[GroupScores]:
    """Measure every component of every prunable group: singleton fidelity, energy score, removal cost and order.

    >>> import modhifi
    >>> scores = modhifi.score("demo:resnet", "demo:calibration", samples=32)
    >>> scores[0].group, tuple(scores[0].singleton.shape)
    ('conv1.0', (16,))
    """
    loaded = _loaded(model, data)
    loaded.model.to(device)
    return score_model(loaded, data, samples, seed, progress, window)


def verify(
    edited: str | Path | nn.Module,
    data: Data,
    *,
    against: Model,
    max_flip: float | None = None,
    max_error: float | None = None,
    confidence: float = 0.95,
    max_perplexity_ratio: float | None = None,
    not_a_sample: bool = False,
    samples: int | None = None,
    window: int | None = None,
    walked: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> BoundReport:
    """Bound how far the outputs of ``edited``, an artefact directory or a module, moved from those of ``against``.

    ``data`` must not have calibrated the edit; for an artefact that is checked. ``max_flip`` is the share of inputs
    whose top-1 may change, ``max_error`` the Euclidean change of the output that 95 % of inputs must keep to,
    ``max_perplexity_ratio`` a causal language model's perplexity over the original's.
    The result's ``verdicts`` answer them; ``enforce()`` raises where one is not met. A module in other shapes than the
    original's gets the statistical rungs only. Raises ModhifiError for bad input, in one line.

    >>> import modhifi
    >>> small = modhifi.prune("demo:resnet", "demo:calibration", ratio=0.1, samples=32, checks={"walked": 0})
    >>> found = modhifi.verify(small.model, "demo:test", against="demo:resnet", max_flip=0.25, samples=200)
    >>> [v.verdict for v in found.verdicts if v.name == "max flip 0.25"]
    ['PASS-STATISTICAL']
    """
    tolerances = Tolerances(max_flip, max_error, confidence, not_a_sample, max_perplexity_ratio)
    original = _loaded(against, data)
    if not isinstance(edited, nn.Module):
        return verify_artifact(
            edited,
            original,
            data,
            tolerances,
            samples=samples,
            window=window,
            walked=walked,
            batch_size=batch_size,
            seed=seed,
            device=device,
            progress=progress,
        )
    usual = held_amounts(original, device)
    n, window = samples or usual.evaluation_samples, window or usual.window
    held = load_samples(data, original, n=n, seed=seed, window=window)
    original.model.to(device)
    edited.to(device)
    return verify_model(
        original,
        edited,
        edited if same_shapes(original.model, edited) else None,
        held,
        tolerances,
        walked=walked,
        batch_size=batch_size or usual.batch_size,
        progress=progress,
    )


def register_selector(name: str, order: Order, summary: str = "", source: str = "") -> None:
    """Add a selector, a rule of which components go first, under a name that recipes and ``method`` then know.

    ``order(readers, seed)`` gets what reads a group's n components, one :class:`modhifi.pruning.readers.Reader` for
    each layer, and gives their numbers from first to last to go, int64 ``(n,)``. What goes is priced and compensated
    as with any other selector. ``summary`` says in one line what the rule is, ``source`` where it is from.
    Lasts as long as the program. Raises ModhifiError for a name that is taken; in :func:`prune`, for an order that is
    no permutation.

    >>> import modhifi, torch
    >>> def last(readers, seed):
    ...     n = len(readers[0].owner)
    ...     return torch.arange(n - 1, -1, -1)
    >>> modhifi.register_selector("last", last, "the last components go first")
    >>> given = {"method": {"selector": "last", "layout": "uniform"}, "checks": {"walked": 0}}
    >>> small = modhifi.prune("demo:resnet", "demo:calibration", ratio=0.5, samples=32, **given)
    >>> small.plan.kept["conv1.0"]
    (0, 1, 2, 3, 4, 5, 6, 7)
    """
    SELECTORS.register(Selector(name, summary, source, order))


def _loaded(model: Model, data: Data) -> LoadedModel:
    """A module that is neither timm's nor transformers' takes its example batch from the data."""
    if isinstance(model, LoadedModel):
        return model
    if not isinstance(model, nn.Module) or hasattr(model, "pretrained_cfg") or hasattr(model, "config"):
        return load_model(model)
    if isinstance(data, str):
        raise ModhifiError("a module of your own needs tensors as data, or modhifi.load_model(module, example=BATCH)")
    example = next(data.batches(2)) if isinstance(data, Samples) else first_items(data)
    return load_model(model, example=example)
