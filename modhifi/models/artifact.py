"""Reading an artefact directory: its weights, and the model that they and the manifest make."""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modhifi.disk import MANIFEST, home_path
from modhifi.errors import ModhifiError
from modhifi.models.from_module import from_module
from modhifi.models.hub import explained, fetch_description, fetch_weights, split_revision
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import Artifact, Manifest, ModelEntry, read_manifest
from modhifi.models.packing import Packing
from modhifi.models.plain_copy import plain_copy
from modhifi.models.skeleton import build_skeleton, fill, read_config, reshape
from modhifi.models.trust import check_arguments, check_directory, listed_files, no_network
from modhifi.progress import version_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PACKAGES = ("modhifi", "torch", "timm", "transformers", "safetensors")


def load_artifact(directory: str | Path, skeleton: nn.Module | None = None) -> LoadedModel:
    """Rebuilds the model of an artefact: eval mode, on the CPU, plain modules of its own library.

    ``skeleton`` is the dense module, for an artefact made from a module that neither timm nor transformers builds; it
    is copied. Weights that are not those that were saved are told in ``warnings``. Nothing but the files of the
    directory is read. Raises ModhifiError for a directory that is no artefact, one of a newer modhifi, a
    missing skeleton and weights that do not fit.
    """
    directory = home_path(directory)
    manifest = read_manifest(directory)
    entry, base = manifest.model, manifest.base
    check_directory(directory, str(directory), trust_remote_code=False)
    for arguments in (base.args, entry.info.get("model_args")):
        check_arguments(arguments, str(directory))
    with _library_hint(manifest), explained(str(directory)), no_network():
        config = read_config(directory) if entry.framework == "transformers" and skeleton is None else None
        if skeleton is not None:
            model, _ = plain_copy(skeleton, str(directory))
        elif entry.framework == "torch":
            raise ModhifiError(
                f"{directory} was made from a module of your own ({entry.info['architecture']}); pass that "
                "dense module: modhifi.load(directory, skeleton=module)"
            )
        else:
            model = build_skeleton(entry.framework, entry.info, config)
        state, hashes = _read_weights(directory)
        model = fill(reshape(model, entry.differences), state, manifest.weights.tied, str(directory))
        loaded = _loaded_from(model, directory, entry)
    artifact = Artifact(manifest, hashes)
    notes = loaded.warnings
    if not artifact.intact:
        notes.append(f"the weights in {directory} are not those that were saved: their hash differs from {MANIFEST}")
    stated = {key: getattr(base, key) for key in ("repository", "revision", "licence") if key in base.model_fields_set}
    labels = tuple(entry.labels) if entry.labels else None
    info = loaded.info | stated | {"warnings": notes}
    return replace(loaded, labels=labels, artifact=artifact, values=base.values, info=info)


def load(directory: str | Path, *, skeleton: nn.Module | None = None) -> nn.Module:
    """Loads the model of an artefact directory as a plain torch module in eval mode, on the CPU.

    ``hf:ORG/NAME[@REVISION]`` is downloaded first. ``skeleton`` is the dense module, needed for an artefact made from a
    module that neither timm nor transformers builds. Raises ModhifiError as :func:`load_artifact` does, and where the
    hub has no such artefact; warns where the weights are not those that were saved.
    """
    if str(directory).startswith("hf:"):
        name, revision = split_revision(str(directory).removeprefix("hf:"), None)
        snapshot = fetch_description(name, revision)
        fetch_weights(name, snapshot.name)
        directory = snapshot
    loaded = load_artifact(directory, skeleton)
    for text in loaded.warnings:
        warnings.warn(text, stacklevel=2)
    return loaded.model


@contextmanager
def _library_hint(manifest: Manifest) -> Iterator[None]:
    """Names in a ModhifiError the libraries whose versions differ from those that wrote the artefact."""
    try:
        yield
    except ModhifiError as error:
        installed = installed_versions()
        recorded = {name: manifest.versions.get(name) for name in (manifest.model.framework, "torch")}
        changed = [
            f"{n} {v} ({installed[n]} is installed)"
            for n, v in recorded.items()
            if v and n in installed and v != installed[n]
        ]
        if not changed:
            raise
        raise ModhifiError(f"{error}; it was written with {' and '.join(changed)}: install those") from error


def installed_versions() -> dict[str, str]:
    """The versions of Python and of every package that an artefact depends on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = version_of(name)
    return versions


def _read_weights(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict, and the SHA-256 of each file that it was read from."""
    state: dict[str, Tensor] = {}
    hashes = {}
    try:
        index = directory / INDEX
        for name in listed_files(index) if index.is_file() else [WEIGHTS]:
            hashes[name] = file_hash(directory / name)
            # Copies: matrix products may round differently where the memory is not aligned as torch aligns it.
            state |= {k: v.clone() for k, v in load_file(directory / name).items()}
    except (OSError, SafetensorError) as error:
        raise ModhifiError(f"cannot read the weights in {directory}: {error}; restore the files") from error
    return state, hashes


def _loaded_from(model: nn.Module, directory: Path, entry: ModelEntry) -> LoadedModel:
    loaded = _of_one_input(model, directory, entry)
    if entry.example is None or "packing" not in entry.example:
        return loaded
    packing = Packing.from_json(entry.example["packing"])
    if loaded.packing == packing:
        return loaded  # the library's own model, which knows its parts
    return replace(loaded, example=packing.example(), packing=packing, kind="tensor", transform=None, parts=())


def _of_one_input(model: nn.Module, directory: Path, entry: ModelEntry) -> LoadedModel:
    source = str(directory)
    if entry.framework == "timm":
        from modhifi.models import from_timm

        return from_timm.loaded_from(model, source)
    if entry.framework == "transformers":
        from modhifi.models import from_transformers

        return from_transformers.loaded_from(model, source, directory)
    assert entry.example is not None
    shape, dtype = entry.example["shape"], getattr(torch, entry.example["dtype"])
    example = torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point:
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return replace(from_module(model, {}, example), source=source)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
