"""The verbs for Python programs: each runs one recipe, on models and data that the program may hold itself.

The tests run every example below, offline, on the model and the images that come with the package.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi.bounds.ladder import BoundReport
from modhifi.calibration.cache import MomentCache
from modhifi.data.in_memory import Data, first_items, held_items, several_inputs, source_name
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.plain_copy import unwrapped
from modhifi.progress import Progress, silent
from modhifi.runs.compare import Comparison, run_compare
from modhifi.runs.devices import resolve_device
from modhifi.runs.heal import HealResult
from modhifi.runs.inputs import Given
from modhifi.runs.plain_modes import plain_modes
from modhifi.runs.prune import PruneResult
from modhifi.runs.recipes.bench import Settings
from modhifi.runs.recipes.compare import CompareRecipe
from modhifi.runs.recipes.files import validate
from modhifi.runs.recipes.tasks import parse
from modhifi.runs.run_recipe import run_recipe
from modhifi.runs.run_task import Circumstances
from modhifi.runs.score import Scores, score_model
from modhifi.runs.timing.bench import Bench, bench_models
from modhifi.runs.timing.subjects import subjects_of
from modhifi.runs.unlearn import UnlearnResult

Model = str | Path | nn.Module | LoadedModel
"""``timm:NAME``, ``hf:ORG/NAME[@REVISION]``, ``demo:resnet``, a directory, a module (it is copied), a loaded model."""


@plain_modes()
def prune(
    model: Model,
    data: Data = "synthetic",
    *,
    ratio: float | None = None,
    params: str | None = None,
    flops: str | None = None,
    kv_cache: str | None = None,
    latency: str | None = None,
    memory: str | None = None,
    experts: str | None = None,
    samples: int | None = None,
    evaluate: Data | None = None,
    evaluation_samples: int | None = None,
    window: int | None = None,
    only_this_data: bool = False,
    method: Mapping[str, Any] | None = None,
    timing: Mapping[str, Any] | None = None,
    checks: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    export: Sequence[str] = (),
    force: bool = False,
    cache: str | Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    offload: bool = False,
    progress: Progress = silent,
) -> PruneResult:
    """Prunes a model to physically smaller layers with forward passes only; the given one stays as it is.

    Exactly one budget is given: ``ratio`` of the components removed, or a share of ``params``, ``flops``,
    ``kv_cache``, ``latency``, ``memory`` or ``experts`` of every mixture kept (``"0.5x"``); a latency may be a time
    (``"12ms"``), a memory, of weights and results of a pass, an amount (``"300MB"``).
    ``data``: a source string, samples, or items that you hold: a tensor ``(n, C, H, W)`` of model-ready inputs, a list
    of tensors or PIL images, a map-style Dataset; or several of them, as ``"self,text:FILE@0.2"``, a list of such
    texts or a `modhifi.Mixture`. ``evaluate`` holds out other data; by default it is a disjoint part of ``data``.
    Files of text are mixed with text that the model writes itself, but for ``only_this_data``.
    ``window`` is tokens in an item of text; amounts that are not given are those of `modhifi.runs.defaults`.
    ``method``, ``timing`` and ``checks``: the keys of those parts of a recipe; ``bounds`` of the result answer the
    checks. With ``out`` the artefact is written there; ``export`` adds a file ``onnx`` or ``pt2``. ``cache`` is a
    directory where moments are kept: a second budget then needs no second pass over the data. ``offload``: weights stay
    in main memory, and one block at a time is on the ``device``; a module that accelerate has dispatched to CPU or disk
    may be given, too.

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
    recipe = parse(
        {
            "task": "prune",
            "model": _named(loaded),
            "data": _given_only(
                source=source_name(data),
                samples=samples,
                evaluate=_data_name(evaluate),
                evaluation_samples=evaluation_samples,
                window=window,
                only_this_data=only_this_data,
            ),
            "budget": _given_only(
                ratio=ratio,
                params=params,
                flops=flops,
                kv_cache=kv_cache,
                latency=latency,
                memory=memory,
                experts=experts,
            ),
            "method": dict(method or {}),
            "timing": dict(timing or {}),
            "checks": dict(checks or {}),
            **_given_only(seed=seed, batch_size=batch_size, offload=offload, out=_path_text(out), export=list(export)),
        },
        "modhifi.prune",
    )
    cache_directory = None if cache is None else Path(cache)
    (done,) = run_recipe(
        recipe,
        Circumstances(device, Given(loaded, data, evaluate), force=force, cache=cache_directory, progress=progress),
    )
    assert isinstance(done.result, PruneResult)
    return done.result


@plain_modes()
def unlearn(
    model: Model,
    data: Data,
    *,
    forget: str | int | Sequence[str | int],
    samples: int | None = None,
    evaluate: Data | None = None,
    evaluation_samples: int | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    checks: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> UnlearnResult:
    """Makes an image classifier forget classes and attacks the result; it is no proof of data deletion.

    ``forget`` is a class or several, by index or name.
    ``data`` holds forgotten and other classes, with labels or without (the model then labels what it is sure of);
    ``evaluate`` holds the images for the attacks and their test. ``settings`` and ``checks``: further keys of those
    parts (``method``, ``checks``) of a recipe. The defaults are those of a recipe.
    Returns the edited ``model``, a JSON-able ``report`` with the audit, and the ``path`` written.
    Raises ModhifiError for bad input, in one line.

    >>> import modhifi
    >>> given = {"evaluate": "demo:test", "method": "erase", "checks": {"walked": 0}}
    >>> result = modhifi.unlearn("demo:resnet", "demo:calibration", forget="frog", **given)
    >>> rows = result.report["audit"]["rows"]
    >>> rows["edited"]["forget"] < 0.1 < 0.8 < rows["edited"]["retain"]
    True
    """
    loaded = _loaded(model, data)
    recipe = parse(
        {
            "task": "unlearn",
            "model": _named(loaded),
            "forget": _classes(forget),
            "data": _given_only(
                source=source_name(data),
                samples=samples,
                evaluate=_data_name(evaluate),
                evaluation_samples=evaluation_samples,
            ),
            "method": {**_given_only(name=method), **(settings or {})},
            "checks": dict(checks or {}),
            **_given_only(seed=seed, batch_size=batch_size, out=_path_text(out)),
        },
        "modhifi.unlearn",
    )
    given = Given(loaded, data, evaluate)
    (done,) = run_recipe(recipe, Circumstances(device, given, force=force, progress=progress))
    assert isinstance(done.result, UnlearnResult)
    return done.result


@plain_modes()
def heal(
    edited: str | Path | nn.Module,
    data: Data = "synthetic",
    *,
    against: Model | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    samples: int | None = None,
    evaluate: Data | None = None,
    evaluation_samples: int | None = None,
    window: int | None = None,
    only_this_data: bool = False,
    method: Mapping[str, Any] | None = None,
    checks: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    export: Sequence[str] = (),
    force: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> HealResult:
    """Distils the original into ``edited``, an artefact directory or a module, which stays as it is; no labels.

    This is the one verb whose gradients reach weights. ``against`` is the original, by default the model that an
    artefact's manifest names. It ends after ``steps`` or ``minutes``, by default after ten minutes. ``data`` and the
    amounts are as in :func:`prune`; to fewer than 1,000 images drawn ones are added, but for ``only_this_data``.
    Classes that an artefact has forgotten stay out of what is learnt. ``method`` and ``checks``: the keys of those
    parts of a recipe. With ``out`` the artefact is written there, and a run that was ended goes on from ``OUT.healing``
    when it is called again.
    Returns the healed ``model``, a JSON-able ``report`` whose ``healing`` has the learning curve, the ``path`` written
    and ``bounds`` of the change against the original. Raises ModhifiError for bad input, in one line.

    >>> import modhifi
    >>> small = modhifi.prune("demo:resnet", "demo:calibration", ratio=0.5, samples=32, checks={"walked": 0})
    >>> given = {"samples": 128, "evaluation_samples": 64, "checks": {"walked": 0}, "batch_size": 32}
    >>> healed = modhifi.heal(small.model, "demo:calibration", against="demo:resnet", steps=8, **given)
    >>> curve = healed.report["healing"]["curve"]
    >>> curve[-1]["divergence"] < curve[0]["divergence"]
    True
    """
    module = edited if isinstance(edited, nn.Module) else None
    if module is not None and against is None:
        raise ModhifiError("a module does not say what it was made from; give against=MODEL")
    original = None if against is None else _loaded(against, data)
    recipe = parse(
        {
            "task": "heal",
            "directory": _directory_or_class(edited),
            **_given_only(against=None if original is None else _named(original)),
            "data": _given_only(
                source=source_name(data),
                samples=samples,
                evaluate=_data_name(evaluate),
                evaluation_samples=evaluation_samples,
                window=window,
                only_this_data=only_this_data,
            ),
            "budget": _given_only(steps=steps, minutes=minutes),
            "method": dict(method or {}),
            "checks": dict(checks or {}),
            **_given_only(seed=seed, batch_size=batch_size, out=_path_text(out), export=list(export)),
        },
        "modhifi.heal",
    )
    given = Given(original, data, evaluate, edited=module)
    (done,) = run_recipe(recipe, Circumstances(device, given, force=force, progress=progress))
    assert isinstance(done.result, HealResult)
    return done.result


@plain_modes()
def bench(
    *models: str | Path | nn.Module | LoadedModel,
    runtime: Sequence[str] = ("eager",),
    batch: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    window: int | None = None,
    data: Data = "synthetic",
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Bench:
    """Times models side by side in one process, in turns, in every runtime, batch size and number of threads.

    A model is what :func:`prune` takes, an artefact, beside which its original is timed, or an ONNX file. ``runtime``:
    ``eager``, ``compile``, ``onnx``. Without ``threads`` torch's current number is taken. ``window`` is the tokens of
    an input of text, ``data`` the inputs of modules that are neither timm's nor transformers'.
    Returns ``rows``, one for each model and setting: seconds a batch and the ratio to the original, both with their
    interquartile range, and the bytes that a pass needs. Raises ModhifiError for bad input, in one line.

    >>> import modhifi
    >>> result = modhifi.bench("demo:resnet", batch=[4])
    >>> result.rows[0].ratio, result.rows[0].median > 0
    (1.0, True)
    """
    if not models:
        raise ModhifiError("give at least one model to time")
    content = {"runtime": list(runtime), "batch": list(batch), "threads": list(threads), "window": window}
    settings = validate(Settings, content, "modhifi.bench")
    loaded = [m if isinstance(m, str | Path) else _loaded(m, data) for m in models]
    subjects, notes = subjects_of(loaded, resolve_device(device))
    return bench_models(subjects, settings, notes, progress)


@plain_modes()
def score(
    model: Model,
    data: Data = "synthetic",
    *,
    samples: int | None = None,
    window: int | None = None,
    selector: str = "obs",
    layers: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Scores:
    """Scores every component of every prunable group: singleton fidelity, energy score, removal cost and order.

    ``selector`` finds the order of removal; groups that a pattern of ``layers`` matches are looked into, output channel
    by output channel. ``hifi_share(0.8)`` of a result is the share of components that reach Subset Fidelity 0.8,
    ``subset_fidelity()`` the curve against their number. Returns one :class:`modhifi.runs.score.GroupScores` a group,
    in a list whose ``left`` names the groups that cannot be measured, each with the reason. Raises ModhifiError for bad
    input, in one line.

    >>> import modhifi
    >>> scores = modhifi.score("demo:resnet", "demo:calibration", samples=32)
    >>> scores[0].group, tuple(scores[0].singleton.shape)
    ('conv1.0', (16,))
    """
    loaded = _loaded(model, data)
    loaded.model.to(resolve_device(device))
    return score_model(loaded, data, samples, seed, progress, window, selector, layers)


@plain_modes()
def compare(
    model: Model,
    data: Data = "synthetic",
    *,
    selectors: Sequence[str] | None = None,
    compensate: Sequence[str] | None = None,
    flops: Sequence[str] = (),
    params: Sequence[str] = (),
    ratio: Sequence[float] = (),
    samples: int | None = None,
    evaluate: Data | None = None,
    evaluation_samples: int | None = None,
    window: int | None = None,
    method: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    cache: str | Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Comparison:
    """Prunes a model with every selector, compensation and budget on shared moments, and compares the results.

    Budgets are shares of FLOPs or parameters kept (``["0.7x", "0.5x"]``) or of components removed (``[0.3]``); the
    defaults are those of `modhifi compare`. ``method`` has what all cells share; all else is as in :func:`prune`.
    The result's ``report["comparison"]["cells"]`` has a row for each: size, time, quality, whether it is on a Pareto
    front, and ``error`` where a budget is out of reach. With ``out`` report and pictures are written there. Raises
    ModhifiError for bad input, in one line.

    >>> import modhifi
    >>> given = {"samples": 32, "evaluation_samples": 64, "method": {"layout": "uniform"}}
    >>> grid = {"selectors": ["obs", "random"], "compensate": ["lstsq"], "ratio": [0.5]}
    >>> result = modhifi.compare("demo:resnet", "demo:calibration", **grid, **given)
    >>> obs, random = result.report["comparison"]["cells"]
    >>> obs["quality"] > random["quality"]
    True
    """
    loaded = _loaded(model, data)
    content = {
        "model": _named(loaded),
        "data": _given_only(
            source=source_name(data),
            samples=samples,
            evaluate=_data_name(evaluate),
            evaluation_samples=evaluation_samples,
            window=window,
        ),
        "method": dict(method or {}),
        **_given_only(selectors=selectors and list(selectors), compensate=compensate and list(compensate)),
        **_given_only(seed=seed, batch_size=batch_size, out=_path_text(out)),
        **{"flops": _several(flops), "params": _several(params), "ratio": _several(ratio)},
    }
    return run_compare(
        validate(CompareRecipe, content, "modhifi.compare"),
        device=resolve_device(device),
        given=Given(loaded, data, evaluate),
        force=force,
        cache=None if cache is None else MomentCache(Path(cache)),
        progress=progress,
    )


@plain_modes()
def verify(
    edited: str | Path | nn.Module,
    data: Data,
    *,
    against: Model | None = None,
    max_flip: float | None = None,
    max_error: float | None = None,
    confidence: float | None = None,
    max_perplexity_ratio: float | None = None,
    not_a_sample: bool = False,
    samples: int | None = None,
    window: int | None = None,
    walked: int | None = None,
    allow_overlap: bool = False,
    out: str | Path | None = None,
    force: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> BoundReport:
    """Bounds the change of the outputs of ``edited``, an artefact directory or a module, against its original.

    ``against`` is the original, by default the model that an artefact's manifest names. ``data`` must not have
    calibrated the edit, which is checked for an artefact. ``max_flip`` is the share of inputs whose top-1 may change,
    ``max_error`` the Euclidean change of the output that 95 % of inputs must keep to, ``max_perplexity_ratio`` a causal
    language model's perplexity over the original's. With ``out`` the report is written there: a directory, or a file
    .json or .html. The result's ``verdicts`` answer them; ``enforce()`` raises where one is not met. A module in other
    shapes than the original's gets the statistical rungs only. Raises ModhifiError for bad input, in one line.

    >>> import modhifi
    >>> small = modhifi.prune("demo:resnet", "demo:calibration", ratio=0.1, samples=32, checks={"walked": 0})
    >>> bounds = modhifi.verify(small.model, "demo:test", against="demo:resnet", max_flip=0.25, samples=200)
    >>> [v.verdict for v in bounds.verdicts if v.name == "max flip 0.25"]
    ['PASS-STATISTICAL']
    """
    module = edited if isinstance(edited, nn.Module) else None
    if module is not None and against is None:
        raise ModhifiError("a module does not say what it was made from; give against=MODEL")
    original = None if against is None else _loaded(against, data)
    recipe = parse(
        {
            "task": "verify",
            "directory": _directory_or_class(edited),
            **_given_only(against=None if original is None else _named(original)),
            "data": _given_only(source=source_name(data), samples=samples, window=window, allow_overlap=allow_overlap),
            "checks": _given_only(
                max_flip=max_flip,
                max_error=max_error,
                confidence=confidence,
                max_perplexity_ratio=max_perplexity_ratio,
                not_a_sample=not_a_sample,
                walked=walked,
            ),
            **_given_only(seed=seed, batch_size=batch_size, out=_path_text(out)),
        },
        "modhifi.verify",
    )
    given = Given(original, data, edited=module)
    (done,) = run_recipe(recipe, Circumstances(device, given, force=force, progress=progress))
    assert isinstance(done.result, BoundReport)
    return done.result


@plain_modes()
def audit(
    edited: str | Path | nn.Module,
    data: Data,
    *,
    forget: str | int | Sequence[str | int] = (),
    original: Model | None = None,
    evaluate: Data | None = None,
    reference: str | Path | None = None,
    samples: int | None = None,
    checks: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Attacks ``edited``, an artefact directory or a module that was made to forget; returns the JSON-able report.

    The manifest of an artefact knows the classes (``forget``: index or name) and the ``original``; a module needs both.
    ``data`` are images that the edit did not see, or with ``evaluate``, which the attacks and the test then take, any.
    ``reference`` is a model retrained without the classes. ``checks``: the keys of that part of a recipe; the report's
    ``verdicts`` answer them. Raises ModhifiError for bad input, in one line.

    >>> import modhifi
    >>> images = {"data": "demo:calibration", "evaluate": "demo:test"}
    >>> edited = modhifi.unlearn("demo:resnet", forget="frog", method="erase", checks={"walked": 0}, **images).model
    >>> report = modhifi.audit(edited, forget="frog", original="demo:resnet", **images)
    >>> report["audit"]["rows"]["edited"]["forget"] < 0.1
    True
    """
    module = edited if isinstance(edited, nn.Module) else None
    if module is not None and original is None:
        raise ModhifiError("a module does not say what it was made from; give original=MODEL")
    loaded_original = None if original is None else _loaded(original, data)
    recipe = parse(
        {
            "task": "audit",
            "directory": _directory_or_class(edited),
            "forget": _classes(forget),
            "data": _given_only(source=source_name(data), samples=samples, evaluate=_data_name(evaluate)),
            "checks": dict(checks or {}),
            **_given_only(
                original=None if loaded_original is None else loaded_original.source,
                reference=_path_text(reference),
                seed=seed,
                batch_size=batch_size,
                out=_path_text(out),
            ),
        },
        "modhifi.audit",
    )
    given = Given(loaded_original, data, evaluate, edited=module)
    (done,) = run_recipe(recipe, Circumstances(device, given, force=force, progress=progress))
    return done.report


def _given_only(**values: Any) -> dict[str, Any]:
    """The values that are not None; for the others the recipe has defaults."""
    return {key: value for key, value in values.items() if value is not None}


def _path_text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _data_name(data: Data | None) -> str | list[str] | None:
    return None if data is None else source_name(data)


def _named(loaded: LoadedModel) -> dict[str, Any]:
    """A recipe's entry on a model that the program holds."""
    return {"name": loaded.source, **({"values": True} if loaded.values else {})}


def _directory_or_class(edited: str | Path | nn.Module) -> str:
    return f"a {type(edited).__name__}" if isinstance(edited, nn.Module) else str(edited)


def _classes(forget: str | int | Sequence[str | int]) -> list[str]:
    try:
        # Numbers of numpy and torch are indices, too.
        given: Sequence[Any] = [forget if isinstance(forget, str) else operator.index(forget)]  # type: ignore[arg-type]
    except TypeError:
        given = list(forget)  # type: ignore[arg-type]
    return [one if isinstance(one, str) else str(operator.index(one)) for one in given]


def _several(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | float | int) else list(given)


def _loaded(model: Model, data: Data) -> LoadedModel:
    """Loads the model; items of several inputs are its example, and so are the items for a module without its own."""
    if isinstance(model, LoadedModel):
        return model
    several = several_inputs(data, unwrapped(model)[0] if isinstance(model, nn.Module) else None)
    if several is not None or not isinstance(model, nn.Module):
        return load_model(model, example=several)
    inner, _ = unwrapped(model)
    if isinstance(getattr(inner, "pretrained_cfg", None), dict) or hasattr(inner, "main_input_name"):
        return load_model(model)
    data = held_items(data)
    if isinstance(data, str):
        raise ModhifiError("a module of your own needs tensors as data, or modhifi.load_model(module, example=BATCH)")
    example = next(data.batches(2)) if isinstance(data, Samples) else first_items(data)
    return load_model(model, example=example)
