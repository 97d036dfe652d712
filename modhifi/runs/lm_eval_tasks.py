"""Tasks of lm-evaluation-harness before and after an edit, run by its own code on both models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modhifi.errors import ModhifiError
from modhifi.models.hub import explained
from modhifi.models.loaded import LoadedModel


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task, on ``n`` documents, with lm-eval's standard errors, None where it gives none."""

    task: str
    metric: str
    n: int
    before: float
    after: float
    stderr_before: float | None
    stderr_after: float | None

    def to_json(self) -> dict[str, Any]:
        """The row as JSON-able data."""
        return asdict(self)


def compare_tasks(
    original: LoadedModel,
    edited: LoadedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include: Path | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> tuple[TaskRow, ...]:
    """Evaluates lm-eval's ``tasks`` on both models, on their devices; returns every metric of each.

    ``limit`` is the number of documents of each task, None for all; ``include`` is a directory of task files of your
    own. Raises ModhifiError without the package, for other models than causal language models, names that lm-eval does
    not know, and data it cannot get.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ModhifiError(
            "tasks are run by lm-eval, which is not installed: pip install 'modhifi[lm-eval]'"
        ) from error
    for loaded in (original, edited):
        if loaded.kind != "text" or loaded.tokenizer is None:
            raise ModhifiError(
                f"{loaded.source} is no causal language model with a tokenizer, which lm-eval's tasks need"
            )
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ModhifiError(f"lm-eval knows no task {unknown[0]!r}; `lm_eval ls tasks` lists them")

    def evaluate(loaded: LoadedModel) -> dict[str, Any]:
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
        with explained(f"the tasks {', '.join(tasks)}"):
            results = simple_evaluate(
                model=model,
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        return dict(results)

    return _rows(evaluate(original), evaluate(edited))


def _rows(before: dict[str, Any], after: dict[str, Any]) -> tuple[TaskRow, ...]:
    """The rows of lm-eval's results, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    rows = []
    for task, metrics_before in before["results"].items():
        metrics_after = after["results"][task]
        for key, value in metrics_before.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr_key = f"{metric}_stderr,{filter_name}"
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            count = int(before.get("n-samples", {}).get(task, {}).get("effective", 0))
            errors = [r.get(stderr_key) for r in (metrics_before, metrics_after)]
            rows.append(
                TaskRow(
                    task,
                    name,
                    count,
                    float(value),
                    float(metrics_after[key]),
                    *(float(e) if isinstance(e, int | float) else None for e in errors),
                )
            )
    return tuple(rows)
