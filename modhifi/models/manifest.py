"""The manifest of an artefact, ``modhifi.json``: the model, the model it was made from, and how.

It is parsed once, when an artefact is read, and goes on with the loaded model. Keys may be added without a new schema
version: what an older manifest lacks has a default here, what a newer one has besides is kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from typing_extensions import TypedDict

from modhifi.disk import MANIFEST, home_path, read_json
from modhifi.errors import ModhifiError
from modhifi.structure.plan import Plan

SCHEMA_VERSION = 1
# Versions that are read as they stand.
READABLE = (1,)


class Part(BaseModel):
    """A part of the manifest; it may have further keys than those named here."""

    model_config = ConfigDict(extra="allow", frozen=True)


Natural = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Count = int | list[int]


def _dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return name


Dtype = Annotated[str, AfterValidator(_dtype)]


class Base(Part):
    """The open model before every edit.

    ``sha256`` is :func:`modhifi.models.weights.state_hash` of it; ``edits_before`` are earlier artefacts on the way
    here. ``values`` says that several outputs are no scores of classes. ``loading`` is the recipe entry that loads the
    model, where the artefact's own recipe does not hold it.
    """

    source: str
    args: dict[str, JsonValue] = {}
    values: bool = False
    repository: str | None = None
    revision: str | None = None
    licence: str | None = None
    sha256: str | None = None
    edits_before: list[dict[str, Any]] = []
    loading: dict[str, Any] = {}


class Info(TypedDict, total=False):
    """The architecture in its library's words; it may have further keys."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    architecture: str
    model_args: dict[str, JsonValue]
    pretrained_cfg: dict[str, JsonValue]


class Differences(TypedDict):
    """The changes that turn the dense architecture into the model: :func:`modhifi.models.skeleton.differences`."""

    shapes: dict[str, list[Natural] | None]
    attributes: dict[str, dict[str, Count]]
    dtypes: dict[str, Dtype]
    # Modules that are gone: sublayers with the number of values that they return, blocks with 0.
    removed: dict[str, Natural]


def _with_every_part(value: Any) -> Any:
    return {"shapes": {}, "attributes": {}, "dtypes": {}, "removed": {}, **value} if isinstance(value, dict) else value


class Example(TypedDict):
    """A batch that the model takes."""

    shape: list[Size]
    dtype: Dtype
    packing: NotRequired[dict[str, Any]]


class ModelEntry(Part):
    """The description of the model: its dense architecture and the differences to it (see models/skeleton.py)."""

    framework: Literal["timm", "transformers", "torch"]
    info: Info
    differences: Annotated[Differences, BeforeValidator(_with_every_part)]
    kind: Literal["image", "text", "encoder", "audio", "series", "tensor"] = "tensor"
    labels: list[str] | None = None
    example: Example | None = None
    # The function or class of the model's own library that loads it: alone, and with the code beside it; why it fails.
    stock: str | None = None
    remote: str | None = None
    not_alone: str | None = None
    # The class of the tokenizer that lies beside the weights.
    tokenizer: str | None = None


class Weights(Part):
    """The SHA-256 of each weight file, and for each tied name of the state dict the name whose tensor it shares."""

    files: dict[str, str]
    tied: dict[str, str] = {}


class GroupEntry(Part):
    """The kept components of a group of n; ``kind`` is empty in artefacts of earlier versions."""

    name: str
    kind: str = ""
    n: Size
    kept: tuple[Natural, ...]


class ForgottenClass(Part):
    """A class that the model was made to forget."""

    index: Natural
    name: str = ""


class DataEntry(Part):
    """The samples of a run, in words; ``hashes`` holds one content hash a sample."""

    description: str = ""
    hashes: tuple[str, ...] = ()


class Manifest(Part):
    """The content of ``modhifi.json``."""

    schema_version: int
    base: Base
    model: ModelEntry
    weights: Weights
    task: str | None = None
    groups: tuple[GroupEntry, ...] = ()
    recipe: dict[str, Any] = {}
    versions: dict[str, str] = {}
    forgotten: tuple[ForgottenClass, ...] = ()
    calibration: DataEntry = DataEntry()
    held_out: DataEntry = DataEntry()

    def plan(self) -> Plan:
        """The plan of the edit: the kept components of every group that lost some."""
        return Plan({g.name: g.kept for g in self.groups if len(g.kept) < g.n})


@dataclass(frozen=True)
class Artifact:
    """The manifest of a loaded model's directory, and the SHA-256 of each weight file as it was read (``hashes``)."""

    manifest: Manifest
    hashes: Mapping[str, str]

    @property
    def intact(self) -> bool:
        """Whether the weight files, no more and no fewer, are those that the manifest was written for."""
        return dict(self.hashes) == self.manifest.weights.files


def loading_entry(manifest: Manifest) -> dict[str, Any]:
    """The recipe entry that loads the model before every edit; empty where none is known.

    A healing run names the artefact that it starts from, and against which model it was healed.
    """
    healed = manifest.task == "heal"
    first = healed or not manifest.base.edits_before
    stated = manifest.recipe.get("against" if healed else "model") if first else None
    return stated if isinstance(stated, dict) else manifest.base.loading


def read_manifest(directory: str | Path) -> Manifest:
    """Parses ``modhifi.json``; raises ModhifiError if it is missing, broken, or of another schema version."""
    path = home_path(directory) / MANIFEST
    try:
        content = read_json(path)
        version = int(content["schema_version"])
        if version in READABLE:
            return Manifest.model_validate(content)
    except OSError as error:
        if not os.path.lexists(path.parent):
            raise ModhifiError(f"there is no directory {directory}; give one that modhifi wrote") from error
        inside = sorted(path.parent.glob(f"*/{MANIFEST}"))
        hint = f"; is {inside[0].parent} meant?" if inside else ""
        raise ModhifiError(f"{directory} is no modhifi artefact: it has no readable {MANIFEST}{hint}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ModhifiError(f"{path} is broken; restore the file") from error
    if version > SCHEMA_VERSION:
        raise ModhifiError(
            f"{path} has schema version {version} and this modhifi reads up to {SCHEMA_VERSION}; upgrade modhifi"
        )
    writer = (content.get("versions") or {}).get("modhifi", "that wrote it")
    again = f"modhifi recipe run {path.with_name('recipe.yaml')}"
    raise ModhifiError(
        f"{path} has schema version {version}, which this modhifi no longer reads; install the "
        f"modhifi {writer}, or make it again: {again}"
    )
