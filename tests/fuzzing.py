"""Inputs that nobody should write: values, files and command lines, from valid ones by a few changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st
from typer.testing import CliRunner

from modhifi.cli.main import app, load

# Success, a check that failed, bad input; interrupt, closed pipe, SIGTERM.
ALLOWED = (0, 1, 2, 130, 141, 143)

NASTY = [None, True, False, 0, -1, 1, 2**31, 2**70, -(2**70), 1e308, -0.5, float("nan"), float("inf"), float("-inf")]
NASTY += [
    "",
    " ",
    "\x00",
    "\n",
    "../x",
    "/",
    "~",
    "~nouser/x",
    ".",
    "a" * 5000,
    "\ud800",
    "\u202e",
    "é",
    "nan",
    "1e999",
]
NASTY += ["hf:org/name", "timm:resnet10t", "timm:no", "demo:no", "images:/nowhere", "text:", "[x]", "{x", "--out", "*"]
NASTY += [
    [],
    {},
    [[]],
    {"": {}},
    [None],
    {"a": 1},
    {"name": "x"},
    [1, 2],
    ["a"],
    {"shape": [10**12], "dtype": "float32"},
]

leaves = st.sampled_from(NASTY) | st.text(max_size=8) | st.integers() | st.floats()


def changed(value: Any) -> st.SearchStrategy[Any]:
    """The JSON value with one to three changes: an entry replaced, removed, repeated or renamed."""
    return st.integers(1, 3).flatmap(lambda n: _changes(value, n))


def _changes(value: Any, n: int) -> st.SearchStrategy[Any]:
    return st.just(value) if n == 0 else _one_change(value).flatmap(lambda other: _changes(other, n - 1))


@st.composite
def _one_change(draw: st.DrawFn, value: Any) -> Any:
    whole = {"": json.loads(json.dumps(value))}
    places = list(_places(whole))
    owner, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "rename"]))
    if kind == "replace":
        owner[key] = draw(leaves)
    elif kind == "remove" and owner is not whole:
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict) and owner is not whole:
        owner[draw(st.text(max_size=5))] = owner.pop(key)
    else:
        owner[key] = [owner[key]]
    return whole[""]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        yield from _places(inner)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with bytes changed, cut off or repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + draw(st.sampled_from([1, 4, 10**9]))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=6) | st.sampled_from([b"\xff" * 4, b"\x00" * 4, b"[" * 1000]))
        else:
            data[at:at] = data[at : at + 16]
    return bytes(data)


def written(value: Any) -> bytes:
    """The value as JSON, which is YAML as well; half a surrogate pair as the bytes that it would be."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


words = st.sampled_from(
    [str(v) for v in NASTY if not isinstance(v, list | dict) and "\x00" not in str(v)]
) | st.sampled_from(
    [
        "0.5",
        "0.5x",
        "16",
        "1",
        "cpu",
        "auto",
        "obs",
        "random",
        "none",
        "{}",
        "a=b",
        "a=[1]",
        "seed=x",
        "{",
        "!!x",
        "x.json",
        "x.md",
    ]
)


@st.composite
def command_lines(draw: st.DrawFn, verbs: Sequence[Sequence[str]]) -> list[str]:
    """One of the verbs with its first words, and up to five of its options with values of any kind."""
    first = draw(st.sampled_from(verbs))
    command = load(first[0])
    while hasattr(command, "commands"):
        command = command.commands[first[1]]
    options = [p for p in command.params if p.opts[0].startswith("-") and p.name != "help"]
    line = list(first)
    for option in draw(st.lists(st.sampled_from(options), max_size=5)):
        names = [*option.opts, *option.secondary_opts]
        line.append(draw(st.sampled_from(names)))
        if not option.is_flag:
            line.append(draw(words))
    return line + draw(st.lists(words, max_size=1)) * draw(st.booleans())


def outcome(*arguments: object) -> int:
    """The exit code of a command line; fails on a traceback and on another code than those of the documentation."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output and result.exit_code in ALLOWED, (arguments, result.output[-3000:])
    assert result.exit_code != 2 or result.stderr, arguments
    return result.exit_code
