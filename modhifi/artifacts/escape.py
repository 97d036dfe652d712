"""Text that others wrote (names, licences, file names), put into pages, cards, tables and XML as nothing but text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# What XML 1.0 has no place for: control characters, lone surrogates. And marks that turn the order of reading around.
UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
MARKUP = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
# At the beginning of a line: headings, lists, quotes, rules.
LEADING = re.compile(r"^([#+\-=>]|\d+(?=[.)](\s|$)))")


def printable(value: Any) -> Any:
    """The value with every text in it, at any depth, free of what no page can show: a replacement mark stands there."""
    if isinstance(value, str):
        return UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item) for item in value]
    return value


def one_line(value: Any) -> str:
    """A printable text of one line."""
    return " ".join(str(printable(str(value))).split())


def markdown_text(value: Any) -> str:
    """A text in Markdown: no HTML, link, heading, table cell or emphasis comes of it."""
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;")
    return LEADING.sub(_escaped, MARKUP.sub(r"\\\g<0>", text))


def markdown_code(value: Any) -> str:
    """A text as code in Markdown, whatever backticks are in it."""
    text = one_line(value)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    gap = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{gap}{text}{gap}{fence}"


def _escaped(start: re.Match[str]) -> str:
    return f"{start[0]}\\" if start[0].isdigit() else f"\\{start[0]}"
