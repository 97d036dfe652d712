"""Compare two runs: artefact directories, or the report.json of any task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modhifi.artifacts.report import change
from modhifi.disk import read_json
from modhifi.errors import ModhifiError
from modhifi.models.manifest import MANIFEST, Manifest, read_manifest

ABSENT = "absent"


def diff_runs(first: str | Path, second: str | Path) -> dict[str, Any]:
    """What differs between two runs, JSON-able; parts without a difference are empty.

    ``same_weights`` is None where one of the two is no artefact. ``figures``: each measure's result in both (the
    report's ``after``), with the change; ``widths``: groups that keep other numbers of components, or other components
    (``moved``: how many are kept by one alone); ``settings``: keys with other values; ``verdicts``.
    Raises ModhifiError for a path that is neither an artefact nor a report.
    """
    (a, one), (b, two) = _read(Path(first)), _read(Path(second))
    return {
        "first": str(first),
        "second": str(second),
        "same_weights": None if one is None or two is None else one.weights.files == two.weights.files,
        "figures": _figures(a, b),
        "widths": _widths(a, b, one, two),
        "settings": _changed(_flat(a.get("settings")), _flat(b.get("settings"))),
        "verdicts": _changed(_verdicts(a), _verdicts(b)),
    }


def _read(path: Path) -> tuple[dict[str, Any], Manifest | None]:
    file = path / "report.json" if path.is_dir() else path
    try:
        report = read_json(file)
    except OSError as error:
        raise ModhifiError(f"{path} is no artefact and no report; give a directory or a report.json") from error
    if not isinstance(report, dict) or "title" not in report:
        raise ModhifiError(f"{file} is no report of modhifi; give a report.json")
    return report, read_manifest(file.parent) if (file.parent / MANIFEST).is_file() else None


def _figures(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [{row["name"]: row for row in report.get("before_after") or []} for report in (a, b)]
    found = []
    for name in dict.fromkeys([*rows[0], *rows[1]]):
        one, two = (r.get(name, {}) for r in rows)
        unit = one.get("unit", two.get("unit", ""))
        row = {"name": name, "unit": unit, "before": one.get("after"), "after": two.get("after")}
        found.append(
            {"name": name, "unit": unit, "first": row["before"], "second": row["after"], "change": change(row)}
        )
    return found


def _widths(
    a: Mapping[str, Any], b: Mapping[str, Any], one: Manifest | None, two: Manifest | None
) -> list[dict[str, Any]]:
    kept = [{g["name"]: g["kept"] for g in report.get("groups") or []} for report in (a, b)]
    sets = [{g.name: set(g.kept) for g in m.groups} if m is not None else {} for m in (one, two)]
    found = []
    for name in dict.fromkeys([*kept[0], *kept[1]]):
        moved = len(sets[0][name] ^ sets[1][name]) if all(name in s for s in sets) else None
        first, second = kept[0].get(name), kept[1].get(name)
        if first != second or moved:
            found.append({"name": name, "first": first, "second": second, "moved": moved})
    return found


def _verdicts(report: Mapping[str, Any]) -> dict[str, Any]:
    return {v["name"]: v["verdict"] for v in report.get("verdicts") or []}


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {prefix.rstrip("."): content} if prefix else {}
    result: dict[str, Any] = {}
    for key, value in content.items():
        result |= _flat(value, f"{prefix}{key}.")
    return result


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = dict.fromkeys([*a, *b])
    return [
        {"name": name, "first": a.get(name, ABSENT), "second": b.get(name, ABSENT)}
        for name in names
        if a.get(name, ABSENT) != b.get(name, ABSENT)
    ]
