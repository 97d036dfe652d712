"""Recipes as files: reading, overriding, validating, with errors that name file, line and nearest key."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from modhifi.disk import DEPTH
from modhifi.errors import ModhifiError

# More than the longest plan, and few enough to be copied.
MOST_NODES = 10_000_000


class Strict(BaseModel):
    """The base of a recipe's parts: unknown keys are errors, values do not change.

    The text under a key is its description in the JSON schema and in the help of the command line, which shows the
    options of a part in one ``panel``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
    panel: ClassVar[str] = "Advanced"


@dataclass(frozen=True)
class Option:
    """The option of the command line for a key, where its name, panel or type differs from the key's own.

    ``flag`` is ``--data``, ``--coupled/--inner-only``, or a word without dashes for an argument. ``read`` turns the
    typed text, a list of texts with ``repeat``, into the key's value. Beside a key that holds a part, the option is
    that of the part's first key.
    """

    flag: str | None = None
    panel: str | None = None
    metavar: str | None = None
    repeat: bool = False
    read: Callable[[Any], Any] | None = None


R = TypeVar("R", bound=BaseModel)


def validate(kind: type[R], content: Any, where: str | Path, flags: Mapping[str, str] | None = None) -> R:
    """Validates the content as a recipe of one kind.

    ``where`` is the file it was read from, of which an error names the line, or a word for it; ``flags`` map the path
    of a value to the option that gives it, which an error then names. Raises ModhifiError, one line, that names the
    first bad key, and the nearest known one for an unknown key.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        # A key that is unknown here is often the one that is missing there.
        problem = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        # Where one of several kinds is meant, pydantic puts the name of the kind into the path.
        keys = _real_keys(content, problem["loc"])
        path = ".".join(map(str, keys)) or "recipe"
        # An option that is repeated, or holds several with commas, gives the whole list.
        flag = (flags or {}).get(path) or (flags or {}).get(".".join(k for k in keys if isinstance(k, str)))
        changed = flag is not None and flag.startswith("--set")
        position = str(flag) if changed else f"{where}{_line(where, keys)}"
        if problem["type"] == "extra_forbidden":
            known = _keys_at(kind, keys[:-1], content) or _all_keys(kind)
            nearest = difflib.get_close_matches(str(keys[-1]), known, n=1)
            nearest = nearest or difflib.get_close_matches(str(keys[-1]), _all_keys(kind), n=1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else f"; known here: {', '.join(known)}"
            if path == "steps":
                hint = f", of a recipe of several runs; run it with `modhifi recipe run {where}`"
            raise ModhifiError(f"{position}: unknown key '{path}'{hint}") from None
        if problem["type"] == "missing":
            meaning = _meaning(kind, keys, content)
            if flag is not None:
                raise ModhifiError(f"{flag} is missing{meaning}; give it, or a recipe that says it") from None
            raise ModhifiError(f"{position}: '{path}' is missing{meaning}; add it") from None
        # The messages of our own validators name the value.
        explained = problem["type"] == "value_error" or isinstance(problem["input"], dict)
        value = "" if explained else f", not {problem['input']!r}"
        message = problem["msg"].removeprefix("Value error, ")
        raise ModhifiError(f"{flag or f'{position}: {path}'}: {message[:1].lower()}{message[1:]}{value}") from None


def parse_yaml(text: str, where: str | Path) -> Any:
    """The content of a YAML text. Raises ModhifiError where it is none, and where its aliases make it too large."""
    try:
        loader = yaml.SafeLoader(text)
        loader.name = str(where)
        node = loader.get_single_node()
        if _nodes(node, {}, 0) > MOST_NODES:
            raise ValueError("its aliases hold too much")
        return None if node is None else loader.construct_document(node)
    except Exception as error:  # what a tag makes of its text may fail in any way
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ModhifiError(f"{where} is not YAML ({reason}); mend or quote it") from None


def _nodes(node: yaml.Node | None, known: dict[int, float], depth: int) -> float:
    """How many nodes there are once every alias is what it stands for; infinitely many for one that holds itself."""
    if depth > DEPTH:
        raise RecursionError
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_nodes(part, known, depth + 1) for part in parts)
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file; raises ModhifiError for a missing file, bad YAML and anything but a mapping."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise ModhifiError(f"there is no recipe at {path}; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ModhifiError(f"{path} is not YAML ({error}); mend it") from None
    if not isinstance(data, dict):
        raise ModhifiError(f"{path} is no recipe: its top level must be a mapping")
    return data


def apply_overrides(content: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A copy of a recipe's mapping with each ``a.b=value`` set; values are read as YAML.

    Raises ModhifiError for a change of another form.
    """
    result = copy.deepcopy(content)
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals or not path:
            raise ModhifiError(f"--set takes a.b=value, not {change!r}")
        set_value(result, path, parse_yaml(value, f"--set {change}"))
        if isinstance(sweep := result.get("sweep"), dict):  # what is set has the last word
            sweep.pop(path, None)
    return result


def set_flags(changes: Sequence[str]) -> dict[str, str]:
    """The keys that ``--set`` changes, each with what an error then names in place of the file's line."""
    keys = [change.partition("=")[0] for change in changes]
    return {key: f"--set {key}" for key in keys}


def set_value(content: dict[str, Any], path: str, value: Any, flag: str | None = None) -> None:
    """Sets ``a.b`` in place; raises ModhifiError, which names the ``flag``, where ``a`` is a value or a list.

    Data that are written as their sources alone stay the source of what is then set beside it.
    """
    *parents, leaf = path.split(".")
    part = content
    for key in parents:
        if part.get(key) is None:
            part[key] = {}
        elif key == "data" and isinstance(part[key], str | list):
            part[key] = {"source": part[key]}
        part = part[key]
        if not isinstance(part, dict):
            raise ModhifiError(f"{flag or f'--set {path}'}: '{key}' is a value, it holds no '{leaf}'")
    part[leaf] = value


def set_out(content: dict[str, Any], out: str) -> None:
    """Sets the directory that a run writes, in place; a summary inside the old one moves to the new one."""
    old, summary = content.get("out"), content.get("summary")
    if isinstance(old, str) and isinstance(summary, str) and Path(summary).is_relative_to(old):
        content["summary"] = str(Path(out, Path(summary).relative_to(old)))
    content["out"] = out


def to_yaml(content: Any) -> str:
    """The content as YAML, keys in their order."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _real_keys(content: Any, path: Sequence[Any]) -> list[Any]:
    """The keys of an error's path that are in the content, and its last one."""
    keys = []
    for number, key in enumerate(path):
        last = number == len(path) - 1
        inside = (isinstance(content, dict) and key in content) or (isinstance(content, list) and isinstance(key, int))
        if inside:
            content = content[key]
        if inside or last:
            keys.append(key)
    return keys


def _line(where: str | Path, keys: Sequence[Any]) -> str:
    """``:LINE`` of the deepest of the keys that the file holds, empty without a file."""
    if not keys or not isinstance(where, Path) or not where.is_file():
        return ""
    node = yaml.compose(where.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = 1
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            break
        entry = next(((k, v) for k, v in node.value if k.value == str(key)), None)
        if entry is None:
            break
        line, node = entry[0].start_mark.line + 1, entry[1]
    return f":{line}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The recipe parts that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _meaning(kind: type[BaseModel], path: Sequence[Any], content: Any) -> str:
    """The first sentence on a key of the recipe, in brackets; empty for one of which nothing is said."""
    models = _models_at(kind, path[:-1], content)
    said = [m.model_fields[path[-1]].description or "" for m in models if path[-1] in m.model_fields]
    sentence = said[0].partition("; ")[0].removesuffix(".") if said else ""
    return f" ({sentence[:1].lower()}{sentence[1:]})" if sentence else ""


def _keys_at(kind: type[BaseModel], path: Sequence[Any], content: Any) -> list[str]:
    """The keys that the recipe knows at a path."""
    return list(dict.fromkeys(name for model in _models_at(kind, path, content) for name in model.model_fields))


def _models_at(kind: type[BaseModel], path: Sequence[Any], content: Any) -> list[type[BaseModel]]:
    """The parts of the recipe that may stand at a path."""
    models = [kind]
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
        inner = [
            m for model in models if key in model.model_fields for m in _models(model.model_fields[key].annotation)
        ]
        # The keys of a free mapping (names of steps) are no fields: its values are of the kinds found already.
        models = inner or models
        task = content.get("task") if isinstance(content, dict) else None
        models = [m for m in models if "task" in m.model_fields and m.model_fields["task"].default == task] or models
    return models


def _all_keys(kind: type[BaseModel]) -> list[str]:
    keys: dict[str, None] = {}
    for name, field in kind.model_fields.items():
        keys[name] = None
        for model in _models(field.annotation):
            keys |= dict.fromkeys(_all_keys(model))
    return list(keys)
