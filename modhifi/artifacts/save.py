"""An edited model as a directory: weights, manifest, recipe, card and report; written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from modhifi.disk import check_output, home_path, jsonable
from modhifi.models.artifact import WEIGHTS, file_hash, installed_versions
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import MANIFEST, SCHEMA_VERSION, Manifest
from modhifi.models.skeleton import is_stock, own_config, record
from modhifi.models.weights import state_hash
from modhifi.staging import staging
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan

SHARD = "5GB"


def save_artifact(
    out: str | Path,
    edited: nn.Module,
    loaded: LoadedModel,
    structure: Structure | None,
    plan: Plan | None,
    *,
    manifest: Mapping[str, Any],
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    log: str = "",
    force: bool = False,
) -> Path:
    """Write ``edited``, which was made from ``loaded``, as a directory that :func:`load_artifact` reads; its path.

    ``manifest`` holds what the caller knows (task, seed, data, metrics, verdicts); what can be read off the models is
    added. ``structure`` and ``plan`` name the components kept, if any were removed. Everything is written beside
    ``out`` and moved into place at the end: an error or an interrupt leaves nothing behind, and what ``force`` replaces
    stays until then. Raises ModhifiError where :func:`check_output` does or if the disk is full.
    """
    # Drawing libraries, which loading an artefact does without.
    from modhifi.artifacts.model_card import model_card
    from modhifi.artifacts.report import render_html

    out = home_path(out).absolute()
    check_output(out, force)
    base = _base(loaded)
    if loaded.framework == "timm":
        from modhifi.models import from_timm

        # Those of the edited model, which may state its widths there.
        loaded = replace(loaded, info=loaded.info | {"model_args": from_timm.arguments(edited)})
    framework, changes = record(loaded, edited)
    recipe, report = jsonable(dict(recipe)), jsonable(dict(report))
    with staging(out) as directory:
        weights = _write_weights(directory, edited)
        stock, remote = _write_ecosystem_files(directory, edited, loaded, framework, changes)
        content = jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                **manifest,
                "base": base,
                "model": {**_model_entry(loaded, framework, changes), "stock": stock, "remote": remote},
                "groups": _groups(structure, plan),
                "weights": weights,
                "recipe": recipe,
                "versions": installed_versions(),
            }
        )
        _write_json(directory / "report.json", report)
        (directory / "report.html").write_text(render_html(report), encoding="utf-8")
        (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
        if log:
            (directory / "modhifi.log").write_text(log, encoding="utf-8")
        (directory / "README.md").write_text(
            model_card(out.name, Manifest.model_validate(content), report), encoding="utf-8"
        )
        # Last, so that it knows the others: what stands here, and is not named, is not ours to replace.
        content["written"] = sorted({MANIFEST, *(path.name for path in directory.iterdir())})
        _write_json(directory / MANIFEST, content)
    return out


def _write_weights(directory: Path, model: nn.Module) -> dict[str, Any]:
    """Write the state dict in its own dtypes, shared tensors once, and describe it for the manifest."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        plain = tensor.detach().cpu().contiguous()
        # A view on a larger storage would be taken for a tensor shared with its neighbours.
        whole = plain.untyped_storage().nbytes() == plain.nbytes
        state[name] = plain if whole else plain.clone()
    save_torch_state_dict(state, directory, max_shard_size=SHARD)
    files = sorted(directory.glob("*.safetensors"))
    os.umask(mask := os.umask(0))
    for path in files:
        path.chmod(0o666 & ~mask)  # safetensors makes its files private, the others are not
    return {"files": {path.name: file_hash(path) for path in files}, "tied": tied}


def _write_ecosystem_files(
    directory: Path, edited: nn.Module, loaded: LoadedModel, framework: str, changes: dict[str, Any]
) -> tuple[str | None, str | None]:
    """Configuration, tokenizer, image processor; returns what of the model's own library loads the result.

    That is the Auto class with its ``from_pretrained``, or timm's ``create_model``: alone, or, second, with the code
    that lies in the directory. Both are None where only modhifi loads it.
    """
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(str(directory))
    processor = getattr(loaded.transform, "processor", None)
    if processor is not None:
        processor.save_pretrained(str(directory))
    if framework == "timm":
        # Where it cannot say the widths, timm's own loading stops at the first tensor that has another shape.
        from timm.models._hub import save_config_for_hf

        save_config_for_hf(edited, str(directory / "config.json"))
        whole = (directory / WEIGHTS).is_file()  # timm reads no shards
        return ("create_model" if whole and is_stock(edited, loaded, None, changes) else None), None
    elif framework == "transformers":
        from modhifi.artifacts.remote_code import add_code
        from modhifi.models.from_transformers import auto_class

        config = own_config(edited)
        stock = auto_class(config) if is_stock(edited, loaded, config, changes) else None
        remote = None if stock else add_code(directory, config, changes)
        config.save_pretrained(str(directory))
        if getattr(edited, "generation_config", None) is not None and edited.can_generate():  # type: ignore[operator]
            edited.generation_config.save_pretrained(str(directory))  # type: ignore[union-attr,operator]
        return stock, remote
    return None, None


def _base(loaded: LoadedModel) -> dict[str, Any]:
    """The open model that everything started from, through however many edits."""
    if loaded.artifact is not None:
        manifest = loaded.artifact.manifest
        parent = {"source": loaded.source, "task": manifest.task, "files": manifest.weights.files}
        known: dict[str, Any] = manifest.base.model_dump(exclude_unset=True)
        return known | {"edits_before": [*manifest.base.edits_before, parent]}
    known = {key: loaded.info.get(key) for key in ("repository", "revision", "licence")}
    arguments = {"args": loaded.info["model_args"]} if loaded.info.get("model_args") else {}
    return {"source": loaded.source, **arguments, **known, "sha256": state_hash(loaded.model)}


def _model_entry(loaded: LoadedModel, framework: str, changes: dict[str, Any]) -> dict[str, Any]:
    kept = ("architecture", "tag", "class", "model_args", "pretrained_cfg", "config", "dtype", "libraries")
    return {
        "framework": framework,
        "kind": loaded.kind,
        "info": {key: loaded.info[key] for key in kept if key in loaded.info},
        "labels": list(loaded.labels) if loaded.labels else None,
        "example": {"shape": list(loaded.example.shape), "dtype": str(loaded.example.dtype).removeprefix("torch.")},
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
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
