"""Read an artefact directory: the manifest, the weights, and the model that they make."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.models.from_module import from_module
from modhifi.models.hub import fetch_description, fetch_weights, split_revision
from modhifi.models.loaded import LoadedModel, frozen
from modhifi.models.skeleton import build_skeleton, fill, read_config, reshape
from modhifi.progress import version_of

SCHEMA_VERSION = 1
# Versions that are read as they stand. Keys may be added without a new version: what lacks is then not needed.
READABLE = (1,)
NEEDED = ("base", "model", "weights")
MANIFEST = "modhifi.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PACKAGES = ("modhifi", "torch", "timm", "transformers", "safetensors")


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
        now = installed_versions()
        framework = manifest["model"]["framework"]
        then = {name: (manifest.get("versions") or {}).get(name) for name in (framework, "torch")}
        moved = [f"{n} {v} ({now[n]} is installed)" for n, v in then.items() if v and n in now and v != now[n]]
        if not moved:
            raise
        raise ModhifiError(f"{error}; it was written with {' and '.join(moved)}: install those") from error


def weights_match(directory: str | Path) -> bool:
    """Whether the weight files are, by their SHA-256, those that the manifest was written for."""
    files, place = read_manifest(directory)["weights"]["files"], Path(directory).expanduser()
    return all((path := place / name).is_file() and file_hash(path) == sha for name, sha in files.items())


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = version_of(name)
    return found


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
        from modhifi.models import from_timm

        return from_timm.describe(model, source)
    if framework == "transformers":
        from modhifi.models import from_transformers

        return from_transformers.describe(model, source, directory)
    shape, dtype = entry["example"]["shape"], getattr(torch, entry["example"]["dtype"])
    example = torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point:
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return replace(from_module(model, {}, example), source=source)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
