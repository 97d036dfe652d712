"""The comparison of two runs: artefact directories, or the report.json of any task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modhifi.artifacts.formatting import change
from modhifi.artifacts.report_file import read_report
from modhifi.disk import MANIFEST
from modhifi.errors import ModhifiError
from modhifi.models.manifest import Manifest, read_manifest

ABSENT = "absent"
# The rows of times: two runs compare by the ratios to their own originals, which were timed beside them.
LATENCY, THROUGHPUT = "latency, one sample", "throughput, samples a second"


def diff_runs(first: str | Path, second: str | Path) -> dict[str, Any]:
    """The differences between two runs, JSON-able; parts without a difference are empty.

    ``same_weights`` is None where one of the two is no artefact. ``held_out``: the data that either was measured on, in
    words; empty where it is the same, or one does not say. ``figures``: each measure's result in both (the
    report's ``after``, and for times the ratio to the run's own original), with the change; ``widths``: groups that
    keep other numbers of components, or other components (``moved`` is the number that one run alone keeps);
    ``settings``: keys with other values; ``verdicts``.
    Raises ModhifiError for a path that is neither an artefact nor a report.
    """
    (first_report, first_manifest), (second_report, second_manifest) = _read(Path(first)), _read(Path(second))
    return {
        "first": str(first),
        "second": str(second),
        "same_weights": None
        if first_manifest is None or second_manifest is None
        else first_manifest.weights.files == second_manifest.weights.files,
        "held_out": _held_out(first_report, second_report, first_manifest, second_manifest),
        "figures": _figures(first_report, second_report),
        "widths": _widths(first_report, second_report, first_manifest, second_manifest),
        "settings": _changed(_flat(first_report.get("settings")), _flat(second_report.get("settings"))),
        "verdicts": _changed(_verdicts(first_report), _verdicts(second_report)),
    }


def _read(path: Path) -> tuple[dict[str, Any], Manifest | None]:
    file = path / "report.json" if path.is_dir() else path
    try:
        report = read_report(file)
    except OSError as error:
        raise ModhifiError(f"{path} is no artefact and no report; give a directory or a report.json") from error
    return report, read_manifest(file.parent) if (file.parent / MANIFEST).is_file() else None


def _held_out(
    first_report: Mapping[str, Any],
    second_report: Mapping[str, Any],
    first_manifest: Manifest | None,
    second_manifest: Manifest | None,
) -> list[str]:
    told = [dict(report.get("data") or {}) for report in (first_report, second_report)]
    words = [f"{data.get('held_out_samples', 'some')} of {data['held_out']}" for data in told if "held_out" in data]
    hashes = [m.held_out.hashes for m in (first_manifest, second_manifest) if m is not None and m.held_out.hashes]
    differ = set(hashes[0]) != set(hashes[1]) if len(hashes) == 2 else words[:1] != words[1:]
    return words if len(words) == 2 and differ else []


def _figures(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [{row["name"]: row for row in report.get("before_after") or []} for report in (first, second)]
    figures = []
    for name in dict.fromkeys([*rows[0], *rows[1]]):
        first_row, second_row = (r.get(name, {}) for r in rows)
        if name in (LATENCY, THROUGHPUT):
            figures.append(_relative(name, first_row, second_row))
            continue
        unit = first_row.get("unit", second_row.get("unit", ""))
        row = {"name": name, "unit": unit, "before": first_row.get("after"), "after": second_row.get("after")}
        figures.append(
            {"name": name, "unit": unit, "first": row["before"], "second": row["after"], "change": change(row)}
        )
    return figures


def _relative(name: str, first_row: Mapping[str, Any], second_row: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a row of times: each run's ratio to its own original, never seconds of two runs.

    The change says so where the ratios differ by no more than they spread, taken together.
    """
    first, second = _own_ratio(first_row), _own_ratio(second_row)
    figures = {"name": f"{name}, of its own original", "unit": "x", "first": first, "second": second}
    if first is None or second is None:
        return figures | {"change": ""}
    row = {"before": first, "after": second, "ratio": second / first}
    if "spread" in first_row and "spread" in second_row:
        row["spread"] = second / first * math.hypot(first_row["spread"] / first, second_row["spread"] / second)
    return figures | {"change": change(row)}


def _own_ratio(row: Mapping[str, Any]) -> float | None:
    """After over before; reports of earlier versions state no ratio and no spread."""
    before, after = row.get("before"), row.get("after")
    if row.get("ratio") is not None:
        return float(row["ratio"])
    return after / before if before and after is not None else None


def _widths(
    first_report: Mapping[str, Any],
    second_report: Mapping[str, Any],
    first_manifest: Manifest | None,
    second_manifest: Manifest | None,
) -> list[dict[str, Any]]:
    kept = [{g["name"]: g.get("kept") for g in report.get("groups") or []} for report in (first_report, second_report)]
    sets = [{g.name: set(g.kept) for g in m.groups} if m is not None else {} for m in (first_manifest, second_manifest)]
    widths = []
    for name in dict.fromkeys([*kept[0], *kept[1]]):
        swapped = len(sets[0][name] ^ sets[1][name]) if all(name in s for s in sets) else None
        first_kept, second_kept = kept[0].get(name), kept[1].get(name)
        if first_kept != second_kept or swapped:
            widths.append({"name": name, "first": first_kept, "second": second_kept, "moved": swapped})
    return widths


def _verdicts(report: Mapping[str, Any]) -> dict[str, Any]:
    return {v["name"]: v["verdict"] for v in report.get("verdicts") or []}


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {prefix.rstrip("."): content} if prefix else {}
    result: dict[str, Any] = {}
    for key, value in content.items():
        result |= _flat(value, f"{prefix}{key}.")
    return result


def _changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = dict.fromkeys([*first, *second])
    return [
        {"name": name, "first": first.get(name, ABSENT), "second": second.get(name, ABSENT)}
        for name in names
        if first.get(name, ABSENT) != second.get(name, ABSENT)
    ]
