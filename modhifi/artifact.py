"""An edited model as a directory: weights, manifest, recipe, card and report; written whole or not at all."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modhifi.disk import check_output, staging
from modhifi.errors import ModhifiError
from modhifi.hub import fetch_description, fetch_weights, split_revision
from modhifi.load import LoadedModel, frozen, load_model
from modhifi.progress import version_of
from modhifi.reload import verify_reload
from modhifi.skeleton import build_skeleton, fill, is_stock, own_config, read_config, record, reshape

if TYPE_CHECKING:
    from modhifi.data import Samples
    from modhifi.structure.groups import Structure
    from modhifi.structure.plan import Plan

__all__ = [
    "check_output",
    "describe_data",
    "load",
    "load_artifact",
    "read_manifest",
    "save_artifact",
    "state_hash",
    "verify_reload",
    "weights_match",
]
SCHEMA_VERSION = 1
# Versions that are read as they stand. Keys may be added without a new version: what lacks is then not needed.
READABLE = (1,)
NEEDED = ("base", "model", "weights")
MANIFEST = "modhifi.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "5GB"
PACKAGES = ("modhifi", "torch", "timm", "transformers", "safetensors")


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
    from modhifi.card import model_card
    from modhifi.disk import jsonable
    from modhifi.report import render_html

    out = Path(out).expanduser().absolute()
    check_output(out, force)
    base = _base(loaded)
    if loaded.framework == "timm":
        from modhifi import load_timm

        # Those of the edited model, which may state its widths there.
        loaded = replace(loaded, info=loaded.info | {"model_args": load_timm.arguments(edited)})
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
                "versions": _versions(),
            }
        )
        _write_json(directory / MANIFEST, content)
        _write_json(directory / "report.json", report)
        (directory / "report.html").write_text(render_html(report), encoding="utf-8")
        (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
        if log:
            (directory / "modhifi.log").write_text(log, encoding="utf-8")
        (directory / "README.md").write_text(model_card(out.name, content, report), encoding="utf-8")
    return out


def load_artifact(directory: str | Path, skeleton: nn.Module | None = None) -> LoadedModel:
    """Rebuild the model of an artefact: eval mode, on the CPU, plain modules of its own library.

    ``skeleton`` is the dense module, for an artefact made from a module that neither timm nor transformers builds; it
    is copied. Weights that are not those once saved are told in ``info["notes"]``. Raises ModhifiError for a directory
    that is no artefact, one of a newer modhifi, a missing skeleton and weights that do not fit.
    """
    directory = Path(directory).expanduser()
    manifest = read_manifest(directory)
    entry, base = manifest["model"], manifest["base"]
    framework, info = entry["framework"], entry["info"]
    config = read_config(directory) if framework == "transformers" and skeleton is None else None
    with _library_hint(manifest):
        if skeleton is not None:
            model = frozen(copy.deepcopy(skeleton).cpu())
        elif framework == "torch":
            raise ModhifiError(
                f"{directory} was made from a module of your own ({info['architecture']}); pass that "
                "dense module: modhifi.load(directory, skeleton=module)"
            )
        else:
            model = build_skeleton(framework, info, config)
        model = fill(
            reshape(model, entry["differences"]), _read_weights(directory), manifest["weights"]["tied"], str(directory)
        )
    loaded = _describe(model, framework, directory, entry)
    notes = list(loaded.info["notes"])
    if not weights_match(directory):
        notes.append(f"the weights in {directory} are not those that were saved: their hash differs from {MANIFEST}")
    artifact = {
        "task": manifest.get("task"),
        "base": base,
        "weights": manifest["weights"],
        "differences": entry["differences"],
    }
    known = {key: base[key] for key in ("repository", "revision", "licence") if key in base}
    labels = tuple(entry["labels"]) if entry.get("labels") else None
    return replace(loaded, labels=labels, info=loaded.info | known | {"notes": notes, "artifact": artifact})


def load(directory: str | Path, *, skeleton: nn.Module | None = None) -> nn.Module:
    """The model of an artefact directory as a plain torch module in eval mode, on the CPU.

    ``hf:ORG/NAME[@REVISION]`` is fetched first. ``skeleton`` and errors: see :func:`load_artifact`.
    """
    if str(directory).startswith("hf:"):
        name, revision = split_revision(str(directory).removeprefix("hf:"), None)
        fetched = fetch_description(name, revision)
        fetch_weights(name, fetched.name)
        directory = fetched
    return load_artifact(directory, skeleton).model


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The content of ``modhifi.json``; ModhifiError if it is missing, broken, or of a modhifi too new or too old."""
    path = Path(directory).expanduser() / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = int(manifest["schema_version"])
        if version in READABLE and not all(isinstance(manifest[part], dict) for part in NEEDED):
            raise ValueError("parts are missing")
    except OSError as error:
        raise ModhifiError(f"{directory} is no modhifi artefact: it has no readable {MANIFEST}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ModhifiError(f"{path} is broken; restore the file") from error
    if version > SCHEMA_VERSION:
        raise ModhifiError(
            f"{path} has schema version {version} and this modhifi reads up to {SCHEMA_VERSION}; upgrade modhifi"
        )
    if version not in READABLE:
        writer = (manifest.get("versions") or {}).get("modhifi", "that wrote it")
        again = f"modhifi recipe run {path.with_name('recipe.yaml')}"
        raise ModhifiError(
            f"{path} has schema version {version}, which this modhifi no longer reads; install the "
            f"modhifi {writer}, or make it again: {again}"
        )
    return manifest


@contextmanager
def _library_hint(manifest: Mapping[str, Any]) -> Iterator[None]:
    """Say, where a model cannot be rebuilt, which of its libraries are other ones than those it was written with."""
    try:
        yield
    except ModhifiError as error:
        now = _versions()
        framework = manifest["model"]["framework"]
        then = {name: (manifest.get("versions") or {}).get(name) for name in (framework, "torch")}
        moved = [f"{n} {v} ({now[n]} is installed)" for n, v in then.items() if v and n in now and v != now[n]]
        if not moved:
            raise
        raise ModhifiError(f"{error}; it was written with {' and '.join(moved)}: install those") from error


def weights_match(directory: str | Path) -> bool:
    """Whether the weight files are, by their SHA-256, those that the manifest was written for."""
    files, place = read_manifest(directory)["weights"]["files"], Path(directory).expanduser()
    return all((path := place / name).is_file() and _sha256(path) == sha for name, sha in files.items())


def describe_data(samples: Samples) -> dict[str, Any]:
    """The fingerprint of a set of samples for a manifest: one hash per item, so that an overlap can be found."""
    return {
        "description": samples.description,
        "n": len(samples),
        "fingerprint": samples.fingerprint(),
        "hashes": list(samples.hashes),
        "synthetic": samples.synthetic,
        "skipped": [list(item) for item in samples.skipped],
    }


def state_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's state dict: 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- writing -----------------------------------------------------------------------------------------------------------
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
    return {"files": {path.name: _sha256(path) for path in files}, "tied": tied}


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
        from modhifi.load_transformers import auto_class
        from modhifi.remote_code import add_code

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
    if "artifact" in loaded.info:
        artifact = loaded.info["artifact"]
        parent = {"source": loaded.source, "task": artifact["task"], "files": artifact["weights"]["files"]}
        return {**artifact["base"], "edits_before": [*artifact["base"].get("edits_before", []), parent]}
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


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = version_of(name)
    return found


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


# -- reading -----------------------------------------------------------------------------------------------------------
def _read_weights(directory: Path) -> dict[str, Tensor]:
    try:
        index = directory / INDEX
        names = [WEIGHTS]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        # Copies: matrix products may round differently where the memory is not aligned as torch aligns it.
        return {k: v.clone() for name in names for k, v in load_file(directory / name).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModhifiError(f"cannot read the weights in {directory}: {error}; restore the files") from error


def _describe(model: nn.Module, framework: str, directory: Path, entry: dict[str, Any]) -> LoadedModel:
    source = str(directory)
    if framework == "timm":
        from modhifi import load_timm

        return load_timm.describe(model, source)
    if framework == "transformers":
        from modhifi import load_transformers

        return load_transformers.describe(model, source, directory)
    shape, dtype = entry["example"]["shape"], getattr(torch, entry["example"]["dtype"])
    example = torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point:
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return replace(load_model(model, example=example), source=source)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
