"""Options from recipes: the command line offers an option for every key of a recipe."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer
from pydantic.fields import FieldInfo
from typer.models import ArgumentInfo, ParameterInfo

from modhifi.runs.recipes.bundled import find
from modhifi.runs.recipes.files import (
    Option,
    Strict,
    apply_overrides,
    read_yaml,
    set_flags,
    set_out,
    set_value,
    validate,
)
from modhifi.runs.recipes.prune import ModelSource

from .common import PANELS

METAVARS = {"integer": "<int>", "number": "<float>", "string": "TEXT", "array": "TEXT"}
# What stands for the value of an option whose recipe's key says no more than that it is text.
PLACEHOLDERS = {
    "--data": "SOURCE",
    "--evaluate": "SOURCE",
    "--forget-data": "SOURCE",
    "--members": "SOURCE",
    "--flops": "SHARE",
    "--params": "SHARE",
    "--kv-cache": "SHARE",
    "--latency": "SHARE|TIME",
    "--memory": "SHARE|BYTES",
    "--only": "PATTERN",
    "--exclude": "PATTERN",
    "--export": "FORMAT",
    "--revision": "REVISION",
    "--gguf-file": "FILE",
}
# Longer lists of names stand in the help's text: an 80-column screen would break them in the middle of a word.
LONGEST_CHOICE = 14

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="A YAML file, an artefact's directory, or a name of `recipe ls`; the other options change its values.",
        rich_help_panel="Advanced",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=1", help="Change a value of the recipe; repeat it.", rich_help_panel="Advanced"),
]
K = TypeVar("K", bound=Strict)


class Loading(Strict):
    """The model of a verb that runs no recipe."""

    model: ModelSource


@dataclass(frozen=True)
class Key:
    """A recipe's key as an option: its ``path`` ``a.b``, its JSON schema, its flag and the panel of its help."""

    path: str
    schema: Mapping[str, Any]
    default: Any
    help: str
    option: Option
    panel: str
    required: bool

    @property
    def parameter(self) -> str:
        """The name of the verb's parameter."""
        return self.path.replace(".", "_")

    @property
    def flag(self) -> str:
        """The option's flag, or the name of an argument."""
        word = self.path.rpartition(".")[2].replace("_", "-")
        return self.option.flag or (f"--{word}/--no-{word}" if self.default is True else f"--{word}")

    @property
    def is_argument(self) -> bool:
        """Whether the key is an argument, not an option."""
        return not self.flag.startswith("-")

    @property
    def repeated(self) -> bool:
        """Whether the option may be given several times."""
        return self.option.repeat or self.schema.get("type") == "array"

    def annotation(self) -> Any:
        """The parameter's type for typer; numbers stay text, which the recipe parses with errors of one line."""
        # The bracket is escaped: typer reads help texts as rich markup.
        text = self.help.replace("[", "\\[")
        metavar = self.option.metavar or PLACEHOLDERS.get(self.flag) or METAVARS.get(self.schema.get("type", ""))
        if self.is_argument:
            return Annotated[str, typer.Argument(metavar=self.flag, help=text, show_default=False)]
        kind: Any = str
        if self.schema.get("type") == "boolean":
            kind = bool
        elif "enum" in self.schema:
            names = self.schema["enum"]
            kind = Literal[tuple(names)]
            metavar = "|".join(names)
            if len(metavar) > LONGEST_CHOICE:
                metavar, text = "NAME", f"{text.removesuffix('.')} ({', '.join(names)})."
        elif self.repeated:
            kind = list[str]
        elif self.default is None:
            kind = str | None
        return Annotated[kind, typer.Option(self.flag, metavar=metavar, help=text, rich_help_panel=self.panel)]


def keys_of(kind: type[Strict], prefix: str = "") -> Iterator[Key]:
    """Every key of a recipe and of its parts that holds a value, except the name of the task."""
    schemas = kind.model_json_schema()["properties"]
    for name, field in kind.model_fields.items():
        if name == "task":
            continue
        option = next((m for m in field.metadata if isinstance(m, Option)), None)
        part = _part(field)
        if part is not None:
            first, *others = keys_of(part, f"{prefix}{name}.")
            if option is not None:
                first = replace(first, option=option, help=field.description or first.help)
            yield from (replace(key, required=key.required and field.is_required()) for key in (first, *others))
            continue
        option = option or Option()
        schema = next((s for s in schemas[name].get("anyOf", []) if s.get("type") != "null"), schemas[name])
        default = None if field.is_required() else field.get_default()
        if option.repeat or schema.get("type") == "array":
            default = [*default] if default else None
        panel = option.panel or kind.panel
        yield Key(prefix + name, schema, default, field.description or "", option, panel, field.is_required())


def _part(field: FieldInfo) -> type[Strict] | None:
    """The part of a recipe that a field holds, if it holds one."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Strict)), None)


def takes(
    kind: type[K],
    *,
    base: Mapping[str, Any] | None = None,
    only: tuple[str, ...] | None = None,
    without: Mapping[str, str] | None = None,
    files: bool = True,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a verb of ``function(recipe, **more)``: an option for every key of ``kind``, then the function's own.

    ``base`` is the recipe that the options change, ``only`` the keys that get an option, ``without`` those that get
    none, each with the reason; ``files`` also lets a recipe's file be the base, whose path, or None, the function then
    gets behind the recipe.
    """
    keys = [k for k in keys_of(kind) if (only is None or k.path in only) and k.path not in (without or {})]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1 + files :]

        def verb(ctx: typer.Context, **values: Any) -> None:
            parsed = [(k, values.pop(k.parameter)) for k in keys]
            given = [(k, v) for k, v in parsed if _is_given(ctx, k.parameter)]
            file, changes = values.pop("recipe", None), values.pop("set_values", None)
            recipe = compose(kind, keys, given, base or {}, file, changes or [])
            read = (None if file is None else find(file),) if files else ()
            function(recipe, *read, **values)

        parameters = []
        for k in keys:
            # A recipe's file may hold the value that no option gives.
            missing = inspect.Parameter.empty if k.required and not files else k.default
            parameters.append(_parameter(k.parameter, k.annotation(), _value(base, k.path, missing)))
        parameters += own
        if files:
            parameters += [_parameter("recipe", RecipeOption, None), _parameter("set_values", SetOption, None)]
        parameters.sort(key=_help_position)
        parameters.insert(0, inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])
        verb.__signature__ = signature  # type: ignore[attr-defined]
        verb.__annotations__ = {p.name: p.annotation for p in parameters}
        verb.__name__, verb.__doc__ = function.__name__, function.__doc__
        return verb

    return decorate


def compose(
    kind: type[K],
    keys: Sequence[Key],
    given: Sequence[tuple[Key, Any]],
    base: Mapping[str, Any],
    file: str | None,
    changes: Sequence[str],
) -> K:
    """Composes the recipe from a file or a base, the options and ``--set``.

    ``changes`` (``--set``) win over the options that are ``given``, and these over the file or base. Of the
    alternatives that a kind of recipe names, one that is given replaces all of the file's.
    """
    path = None if file is None else find(file)
    content = copy.deepcopy(dict(base)) if path is None else read_yaml(path)
    alternatives = getattr(kind, "alternatives", ())
    if any(f"{key.path}.".startswith(f"{a}.") for key, _ in given for a in alternatives):
        for alternative in alternatives:
            _remove(content, alternative)
    for name, field in kind.model_fields.items():
        if path is None and field.is_required() and _part(field) is not None:
            content.setdefault(name, {})
    for key, value in given:
        value = key.option.read(value) if key.option.read else value
        if key.path == "out":
            set_out(content, value)
        else:
            set_value(content, key.path, value, key.flag.partition("/")[0])
    flags = {key.path: key.flag.partition("/")[0] for key in (keys if path is None else [key for key, _ in given])}
    return validate(kind, apply_overrides(content, changes), path or "the options", flags | set_flags(changes))


def _is_given(ctx: typer.Context, parameter: str) -> bool:
    source = ctx.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"


def _value(content: Any, path: str, default: Any) -> Any:
    """The value at a path of a recipe's content, if there is one."""
    for key in path.split("."):
        if not isinstance(content, Mapping) or key not in content:
            return default
        content = content[key]
    return content


def _remove(content: dict[str, Any], path: str) -> None:
    """Removes a path from a recipe's content, in place."""
    parents, _, leaf = path.rpartition(".")
    parent = _value(content, parents, None) if parents else content
    if isinstance(parent, dict):
        parent.pop(leaf, None)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _help_position(parameter: inspect.Parameter) -> int:
    """The position of a parameter in the help: arguments first, then panel by panel."""
    (info,) = (m for m in get_args(parameter.annotation) if isinstance(m, ParameterInfo))
    return 0 if isinstance(info, ArgumentInfo) else 1 + PANELS.index(info.rich_help_panel or "Advanced")
