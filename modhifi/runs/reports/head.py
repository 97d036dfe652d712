"""The first keys of a report, the same for every verb."""

from __future__ import annotations

from typing import Any

# Readers of report.json may rely on its keys as long as this stays.
SCHEMA_VERSION = 1


def head(task: str, source: str, **model: Any) -> dict[str, Any]:
    """Version, title, task and model of a report.

    ``task`` is the verb, ``source`` what it ran on (a model name or the directory of a result), ``model`` what else is
    said of it.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "title": f"modhifi {task} {source}",
        "task": task,
        "model": {"source": source, **model},
    }
