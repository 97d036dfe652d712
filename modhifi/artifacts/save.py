"""Writing an artefact: a directory of weights, manifest, recipe, card and report, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from modhifi.artifacts.reload_check import FreshProcess, Loader
from modhifi.disk import MANIFEST, RECIPE, check_output, home_path, jsonable
from modhifi.models.artifact import WEIGHTS, file_hash, installed_versions
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import SCHEMA_VERSION, Differences, Manifest, loading_entry
from modhifi.models.plain_copy import normed_again
from modhifi.models.skeleton import is_stock, own_config, record
from modhifi.models.stock import stating
from modhifi.models.weights import state_hash
from modhifi.progress import LOG, muted
from modhifi.staging import staging
from modhifi.structure.depth import removed_parts
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan

SHARD = "5GB"
logger = logging.getLogger(__name__)


def save_artifact(
    out: str | Path,
    edited: nn.Module,
    original: LoadedModel,
    structure: Structure | None,
    plan: Plan | None,
    *,
    manifest: Mapping[str, Any],
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    log: str = "",
    force: bool = False,
    process: FreshProcess | None = None,
) -> Path:
    """Writes ``edited``, which was made from ``original``, as a directory for :func:`load_artifact`; returns its path.

    ``manifest`` holds what the caller knows (task, seed, data, metrics, verdicts); facts of the models are added.
    ``structure`` and ``plan`` name the kept components, if any were removed; ``recipe``, ``report`` and ``log`` are
    written as they are. Weight norms that the copy of a module lost are given back to ``edited``. A way to load the
    model without modhifi is named where it gives the outputs of ``edited`` in ``process``, a fresh one. Everything is
    written beside ``out`` and moved into place at the end: an error or an interrupt leaves nothing behind, and a
    directory that ``force`` replaces stays until then. Raises ModhifiError where :func:`check_output` does or if the
    disk is full.
    """
    # They import drawing libraries, which loading an artefact does without.
    from modhifi.artifacts.model_card import model_card
    from modhifi.artifacts.report import render_html

    out = home_path(out).absolute()
    check_output(out, force)
    base = _base(original)
    if original.framework == "timm":
        from modhifi.models import from_timm

        # The arguments of the edited model, which may state its widths.
        original = replace(original, info=original.info | {"model_args": from_timm.arguments(edited)})
    removed = {} if structure is None or plan is None else removed_parts(structure, plan)
    edited = normed_again(edited, original.info.get("weight_norms", {}))
    framework, changes = record(original, stating(edited, original), removed)
    recipe, report = jsonable(dict(recipe)), jsonable(dict(report))
    with staging(out) as directory:
        weights = _write_weights(directory, edited)
        ways = _write_ecosystem_files(directory, edited, original, framework, changes, process)
        content = jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                **manifest,
                "base": base,
                "model": {**_model_entry(original, framework, changes), **ways},
                "groups": manifest.get("groups") or _groups(structure, plan),
                "forgotten": manifest.get("forgotten") or _forgotten_before(original),
                "weights": weights,
                "recipe": recipe,
                "versions": installed_versions(),
            }
        )
        _write_json(directory / "report.json", report)
        (directory / "report.html").write_text(render_html(report), encoding="utf-8")
        (directory / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
        if log:
            (directory / LOG).write_text(log, encoding="utf-8", errors="backslashreplace")
        (directory / "README.md").write_text(
            model_card(out.name, Manifest.model_validate(content), report), encoding="utf-8"
        )
        # Last, so that it knows the others: what stands here, and is not named, is not ours to replace.
        content["written"] = sorted({MANIFEST, *(path.name for path in directory.iterdir())})
        _write_json(directory / MANIFEST, content)
    return out


def _write_weights(directory: Path, model: nn.Module) -> dict[str, Any]:
    """Writes the state dict in its own dtypes, shared tensors once; returns the manifest's entry on it."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in names:
            tied[name] = names[key]
            continue
        names[key] = name
        values = tensor.detach().cpu().contiguous()
        # A view on a larger storage would be taken for a tensor shared with its neighbours.
        owns_storage = values.untyped_storage().nbytes() == values.nbytes
        state[name] = values if owns_storage else values.clone()
    save_torch_state_dict(state, directory, max_shard_size=SHARD)
    files = sorted(directory.glob("*.safetensors"))
    os.umask(mask := os.umask(0))
    for path in files:
        path.chmod(0o666 & ~mask)  # safetensors makes its files private, the others are not
    return {"files": {path.name: file_hash(path) for path in files}, "tied": tied}


def _write_ecosystem_files(
    directory: Path,
    edited: nn.Module,
    original: LoadedModel,
    framework: str,
    changes: Differences,
    process: FreshProcess | None,
) -> dict[str, str | None]:
    """Writes configuration, tokenizer and image processor; returns the manifest's loaders of the model's own library.

    ``stock`` names the one that loads the directory alone, ``remote`` the one that needs the code in it: the name of
    transformers' class, or timm's ``create_model``. Both are None where only modhifi loads it, and ``not_alone`` says
    why where that is found by trying.
    """
    if original.tokenizer is not None:
        original.tokenizer.save_pretrained(str(directory))
    processor = getattr(original.transform, "processor", None)
    if processor is not None:
        processor.save_pretrained(str(directory))
    if original.listener is not None and original.listener.extractor is not None:
        original.listener.extractor.save_pretrained(str(directory))
    if framework == "timm":
        return _write_timm_files(directory, edited, original, changes, process)
    if framework == "transformers":
        return _write_transformers_files(directory, edited, original, changes, process)
    return {"stock": None, "remote": None}


def _write_timm_files(
    directory: Path, edited: nn.Module, original: LoadedModel, changes: Differences, process: FreshProcess | None
) -> dict[str, str | None]:
    from timm.models._hub import save_config_for_hf

    if not hasattr(edited, "num_classes"):  # a pyramid of features, which timm has no file for
        return {"stock": None, "remote": None}
    # Where it cannot say the widths, timm's own loading stops at the first tensor that has another shape.
    with muted("timm.data.model_config"):  # it writes the means of the channels that the model has, and says so
        save_config_for_hf(edited, str(directory / "config.json"))
    unsharded = (directory / WEIGHTS).is_file()  # timm reads no shards
    if not (unsharded and is_stock(edited, original, None, changes)):
        return {"stock": None, "remote": None}
    loader = Loader("timm", "create_model")
    problem = _try(loader, directory, edited, original, process)
    return {"stock": None if problem else loader.name, "remote": None, "not_alone": problem or None}


def _write_transformers_files(
    directory: Path, edited: nn.Module, original: LoadedModel, changes: Differences, process: FreshProcess | None
) -> dict[str, str | None]:
    from modhifi.artifacts.remote_code import add_code, remove_code
    from modhifi.models.from_transformers import class_name

    config, model = own_config(edited), cast(Any, edited)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(str(directory))
    stock = class_name(config) if is_stock(edited, original, config, changes) else None
    remote = None if stock else add_code(directory, config, changes)
    config.save_pretrained(str(directory))
    name = stock or remote
    if name is None:
        return {"stock": None, "remote": None}
    problem = _try(Loader("transformers", name, remote is not None), directory, edited, original, process)
    if not problem:
        return {"stock": stock, "remote": remote}
    if remote:
        remove_code(directory, config)
        config.save_pretrained(str(directory))
    return {"stock": None, "remote": None, "not_alone": problem}


def _try(
    loader: Loader, directory: Path, edited: nn.Module, original: LoadedModel, process: FreshProcess | None
) -> str:
    """What differs between ``edited`` and the model that the loader makes of the directory; empty if nothing."""
    with torch.inference_mode():
        expected = original.outputs(original.example, edited)
    problem = (process or FreshProcess(loader.framework)).difference(directory, original.example, expected, loader)
    if problem:
        logger.warning("only modhifi.load loads %s; %s.%s: %s", original.source, loader.framework, loader.name, problem)
    return problem


def _base(original: LoadedModel) -> dict[str, Any]:
    """The manifest's entry on the open model before every edit."""
    if original.artifact is not None:
        manifest = original.artifact.manifest
        parent = {"source": original.source, "task": manifest.task, "files": manifest.weights.files}
        facts: dict[str, Any] = manifest.base.model_dump(exclude_unset=True)
        facts |= {"loading": loading} if (loading := loading_entry(manifest)) else {}
        return facts | {"edits_before": [*manifest.base.edits_before, parent]}
    facts = {key: original.info.get(key) for key in ("repository", "revision", "licence")}
    arguments = {"args": original.info["model_args"]} if original.info.get("model_args") else {}
    arguments |= {"values": True} if original.values else {}
    return {"source": original.source, **arguments, **facts, "sha256": state_hash(original.model)}


def _forgotten_before(original: LoadedModel) -> list[dict[str, Any]]:
    """The classes that are gone from whatever is made of a model."""
    return [] if original.artifact is None else [entry.model_dump() for entry in original.artifact.manifest.forgotten]


def _model_entry(original: LoadedModel, framework: str, changes: Differences) -> dict[str, Any]:
    keys = ("architecture", "tag", "class", "model_args", "pretrained_cfg", "config", "dtype", "libraries")
    return {
        "framework": framework,
        "kind": original.kind,
        "info": {key: original.info[key] for key in keys if key in original.info},
        "labels": list(original.labels) if original.labels else None,
        "tokenizer": None if original.tokenizer is None else type(original.tokenizer).__name__,
        "example": {
            "shape": list(original.example.shape),
            "dtype": str(original.example.dtype).removeprefix("torch."),
            **({} if original.packing is None else {"packing": original.packing.to_json()}),
        },
        "differences": changes,
    }


def _groups(structure: Structure | None, plan: Plan | None) -> list[dict[str, Any]]:
    if structure is None or plan is None:
        return []
    return [
        {"name": g.name, "kind": g.kind, "n": g.n, "kept": list(plan.kept.get(g.name, range(g.n)))}
        for g in structure.prunable
    ]


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # Half a surrogate pair, as in the name of a file that is no text, becomes JSON's own escape of it.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
