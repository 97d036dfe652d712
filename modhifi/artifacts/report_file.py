"""Reading ``report.json``, which is there to be read again: the parts that a comparison and a model card show."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from modhifi.disk import read_json
from modhifi.errors import ModhifiError

Value = float | str | None


class Row(TypedDict):
    """A figure before and after the edit."""

    name: str
    before: NotRequired[Value]
    after: NotRequired[Value]
    unit: NotRequired[str | None]


class Group(TypedDict):
    """A group and the number of its components that were kept."""

    name: str
    kept: NotRequired[int | None]


class Verdict(TypedDict):
    """A verdict and what it is about."""

    name: str
    verdict: str


class Report(TypedDict):
    """The parts of a report that have to be what the schema says (modhifi/artifacts/report.py)."""

    title: str
    errors: NotRequired[dict[str, Any] | None]
    before_after: NotRequired[list[Row] | None]
    groups: NotRequired[list[Group] | None]
    verdicts: NotRequired[list[Verdict] | None]


CHECK = TypeAdapter(Report)


def read_report(path: Path) -> dict[str, Any]:
    """Reads a ``report.json``; raises OSError where there is none, and ModhifiError where it is no report."""
    content = read_json(path)
    try:
        CHECK.validate_python(content)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "it"
        raise ModhifiError(
            f"{path} is no report of modhifi ({place} is not as it should be); restore the file"
        ) from error
    report: dict[str, Any] = content
    return report
