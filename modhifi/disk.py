"""Checks of where a run writes, before any work."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modhifi.errors import ModhifiError
from modhifi.staging import recover, stays

# An artefact's manifest, and the recipe that repeats a run.
MANIFEST, RECIPE = "modhifi.json", "recipe.yaml"
# The entries of a report's directory, and those that are added to an artefact after it was written.
REPORT = ("report.json", "report.html", RECIPE, "front.png")
ADDED = ("model.onnx", "model.onnx.data", "model.pt2", "__pycache__")
# The entries of an artefact whose manifest does not list them: weights, configuration, tokenizer, card, exports.
OWN = re.compile(
    r"modhifi\.(json|log)|README\.md|recipe\.yaml|report\.(json|html)|(generation_|preprocessor_|processor_)?config\.json"
    r"|model([-.].*)?\.safetensors|model\.safetensors\.index\.json|model\.(onnx|onnx\.data|pt2)|modeling_modhifi\.py"
    r"|(tokenizer|vocab|merges|special_tokens_map|added_tokens|spiece|sentencepiece|chat_template|tokenizer_config)"
    r"[\w.]*\.(json|txt|model|jinja)|additional_chat_templates|__pycache__"
)

# How the files that modhifi writes where it is told to are known again, by the name of their format.
WRITTEN = "modhifi"
SIGNS = {
    "figures": rb'\A\{\s*"schema_version": \d+,\s*"title": "modhifi ',
    "a page": rb"<title>modhifi ",
    "all": rb'\A\[\s*\{\s*"group": ',
    "a table": rb"\Agroup,component,",
    "tensors": rb'\A.{8}\{.*\.subset_fidelity"',
    "a page of charts": rb"<title>Fidelity of the components of ",
    **dict.fromkeys(("an image", "a picture"), rb"\A\x89PNG.*tEXtSoftware\x00modhifi"),
    "a drawing": rb"<dc:title>modhifi<",
    "Markdown": rb"\A### [^\n]*: modhifi ",
    "JUnit": rb'<testsuites name="modhifi"',
}
SIGN_BYTES = 2**20
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")

# Deeper than any file that is meant; what goes through it may call itself once a level.
DEPTH = 100


def home_path(path: str | Path) -> Path:
    """The path with ``~`` and ``~USER`` replaced; ModhifiError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ModhifiError(f"there is no home directory for {path}; write the path in full") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError where it cannot be read, and ModhifiError where it is not JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "its brackets are nested too deeply" if isinstance(error, RecursionError) else error
        raise ModhifiError(f"{path} is not JSON ({reason}); restore the file") from None
    if _deeper(content, DEPTH):
        raise ModhifiError(f"{path} is not JSON of ours (its brackets are nested too deeply); restore the file")
    return content


def _deeper(content: Any, depth: int) -> bool:
    """Whether lists and mappings are nested more than ``depth`` times."""
    level = [content]
    for _ in range(depth):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def jsonable(value: Any) -> Any:
    """The value as JSON-able data: tuples as lists, tensors and numpy numbers as plain ones, paths as text.

    NaN becomes null, and an infinity, which JSON does not have, the text ``Infinity`` or ``-Infinity``.
    """
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return None if math.isnan(value) else value
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [jsonable(v) for v in value]
    return str(value)


def check_output(out: str | Path, force: bool = False, reads: Iterable[Path] = ()) -> None:
    """Raises ModhifiError, before any work, if a directory could not be written to ``out``.

    ``force`` replaces an empty directory or what modhifi wrote, never anything else, and never what the run ``reads``
    (the model, the data, the recipe) or its working directory. Whether ``out`` can be created is tested by creating it.
    """
    out = home_path(out).absolute()
    recover(out)
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ModhifiError(f"{out} is a {'dangling link' if out.is_symlink() else 'file'}; give a directory")
    if os.path.isdir(out) and any(_entries(out)):
        if not force:
            raise ModhifiError(f"{out} is not empty; give another directory, or --force to replace it")
        resolved = out.resolve()
        for path, description in ((Path.cwd(), "the current directory"), (Path.home(), "the home directory")):
            if path.is_relative_to(resolved):
                raise ModhifiError(f"{out} holds {description} and is not replaced; give another one")
        for path in reads:
            if path.resolve().is_relative_to(resolved):
                raise ModhifiError(f"{out} holds {path}, which this run reads, and is not replaced; give another one")
        if (unknown := foreign(out)) is not None:
            raise ModhifiError(
                f"{out} holds '{unknown}', which modhifi did not write, and is not replaced; move it away, or give "
                "another directory"
            )
    _try_to_create(out)


def check_space(out: Path, needed: float) -> None:
    """Raises ModhifiError, before any work, if fewer than the ``needed`` bytes are free on the disk of ``out``."""
    out = out.absolute()
    free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free
    if needed > free:
        raise ModhifiError(
            f"the weights take some {needed / 1e6:,.0f} MB and the disk of {out} has {free / 1e6:,.0f} MB free; make "
            "room, or give --out a directory on another disk"
        )


def foreign(directory: Path) -> str | None:
    """The first entry of a directory that no run of modhifi wrote there; None for an artefact, a report or nothing.

    A run of several steps has a directory for each beside its recipe.
    """
    entries = _entries(directory)
    names = {path.name for path in entries}
    known = set(REPORT) | _summaries(directory)
    if MANIFEST in names:
        known |= _listed_entries(directory) or {name for name in names if OWN.fullmatch(name)}
    elif RECIPE in names and "report.json" not in names:
        known |= leftovers(directory).keys()
        known |= {p.name for p in entries if p.is_dir() and not p.is_symlink() and foreign(p) is None}
    elif "report.json" not in names:
        return min(names, default=None)
    return min(names - known, default=None)


def unfinished(out: Path) -> str:
    """The name of the file that holds the state of a run into ``out``: beside it, or in it where it stays."""
    return f"{out.name}.healing"


def _entries(directory: Path) -> list[Path]:
    """The entries of a directory, but for the state of a run into it and what a file system puts into its root."""
    state = unfinished(directory)
    return [path for path in directory.iterdir() if path.name not in ("lost+found", state, f"{state}.part")]


def _recipe(directory: Path) -> dict[str, Any]:
    """What the recipe in a directory says; nothing where there is none that can be read."""
    try:
        content = yaml.safe_load((directory / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def steps_of(directory: Path) -> set[str]:
    """The names of the steps of the recipe that was run into a directory."""
    steps = _recipe(directory).get("steps")
    # A name that leads elsewhere is none of ours.
    return {name for name in map(str, steps) if Path(name).name == name} if isinstance(steps, dict) else set()


def leftovers(directory: Path) -> dict[str, str]:
    """The names of the files that ended steps of a recipe leave beside their directories, each with its step's."""
    return {
        name: step
        for step in steps_of(directory)
        for state in [unfinished(Path(step))]
        for name in (state, f"{state}.part", f"{step}.log")
    }


def _summaries(directory: Path) -> set[str]:
    """The names of the summaries that the run of a directory, or one of its steps, wrote."""
    recipe = _recipe(directory)
    steps = recipe.get("steps")
    parts = [recipe, *(steps.values() if isinstance(steps, dict) else ())]
    written = [part.get("summary") for part in parts if isinstance(part, dict)]
    return {Path(name).name for name in written if isinstance(name, str)}


def _listed_entries(directory: Path) -> set[str]:
    """The entries that an artefact's manifest names as its own, and those that an export or a loader adds."""
    try:
        names = read_json(directory / MANIFEST).get("written", [])
        return {*map(str, names), *ADDED} if names else set()
    except (OSError, ModhifiError, AttributeError, TypeError):
        return set()


def _try_to_create(out: Path) -> None:
    """Creates a directory and removes it again, with the parents that it needed."""
    parent = out if stays(out) else out.parent
    created: list[Path] = []
    try:
        for path in (*reversed(out.parents), out):
            if not os.path.lexists(path):
                path.mkdir()
                created.append(path)
        tempfile.TemporaryDirectory(prefix=".modhifi-", dir=parent).cleanup()
    except OSError as error:
        raise ModhifiError(
            f"cannot write to {out}: {error.strerror or error}; give --out a directory that can be written"
        ) from error
    finally:
        for path in reversed(created):
            path.rmdir()


def check_file(path: Path | None, option: str, *, within: str | Path | None = None, **endings: str) -> None:
    """Raises ModhifiError, before any work, if a file could not be written to ``path``.

    ``endings`` are the allowed endings, each with the name of its format (``md="Markdown"``). ``within`` is a directory
    that the run creates. Nothing is written into a model or an artefact, and what is there is only replaced where it is
    a file of this format that modhifi wrote.
    """
    if path is None:
        return
    check_ending(path, option, **endings)
    made_by_run = within is not None and path.absolute().is_relative_to(home_path(within).absolute())
    if not made_by_run and not path.absolute().parent.is_dir():
        raise ModhifiError(f"{option} {path}: there is no directory {path.parent}; make it first")
    if not made_by_run:
        try:
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
        except OSError as error:
            raise ModhifiError(
                f"{option} {path} cannot be written: {error.strerror or error}; give a file in another directory"
            ) from error
        _check_place(path)
        _check_replaced(path, option, endings[path.suffix.removeprefix(".")])
    elif OWN.fullmatch(path.name):
        raise ModhifiError(f"{path} would be a file of what the run writes there itself; give another name")


def check_ending(path: Path, option: str, **endings: str) -> None:
    """Raises ModhifiError unless the path has one of the endings, each with the name of its format."""
    if path.suffix.removeprefix(".") not in endings:
        formats = " or ".join(f".{ending} ({name})" for ending, name in endings.items())
        raise ModhifiError(f"{option} {path}: the ending says the format; use {formats}")


def _check_place(path: Path) -> None:
    """Raises ModhifiError for a file inside an artefact or the directory of a model."""
    directory = path.resolve().parent
    if any((parent / MANIFEST).is_file() for parent in (directory, *directory.parents)):
        raise ModhifiError(f"{path} would be a file of an artefact, which stays as it was written; give another place")
    if (directory / "config.json").is_file() and any(p.suffix in WEIGHTS for p in directory.iterdir()):
        raise ModhifiError(f"{path} would be a file of a model, which stays as it is; give another place")


def _check_replaced(path: Path, option: str, kind: str) -> None:
    """Raises ModhifiError where there is something else than an empty file or one of that format from modhifi."""
    if path.is_dir():
        raise ModhifiError(f"{option} {path} is a directory; give a file")
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            start = file.read(SIGN_BYTES)
    except OSError as error:
        raise ModhifiError(f"{option} {path} cannot be read: {error.strerror or error}; give another name") from error
    if start and not re.search(SIGNS[kind], start, re.DOTALL):
        raise ModhifiError(
            f"{option} {path} is there, and modhifi did not write it as such a file; move it away, or give another name"
        )
