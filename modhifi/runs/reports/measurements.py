"""What a run measures of both models on held-out samples, and the figures before and after."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from modhifi.artifacts.diff import LATENCY, THROUGHPUT
from modhifi.bounds.held_out import HeldOut
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel, last_logits
from modhifi.progress import Progress, silent
from modhifi.runs import measure
from modhifi.runs.reports.agreements import agreements
from modhifi.runs.timing.machine import device_name
from modhifi.runs.timing.turns import Latency, Spread, compare_latency, ratio

# How well the values of the original are kept.
EXPLAINED = "outputs, share of their variance kept (R²)"
# Full batches of held-out samples below which a spread of throughputs means nothing.
FEWEST_BATCHES = 3


def measure_run(
    original: LoadedModel,
    edited: nn.Module,
    held: Samples,
    table: HeldOut | None,
    batch_size: int,
    progress: Progress = silent,
    *,
    exact: nn.Module | None = None,
) -> dict[str, Any]:
    """Measures errors, size, throughput and latency of both models, on the device of the edited one.

    ``table`` holds the outputs of both on ``held``, None where they cannot be compared. The latency of ``exact``, a
    network whose widths were not rounded, is measured too.
    """
    item = original.ready(held.first(1), edited)

    def forward(model: nn.Module, batch: Tensor) -> None:
        # Without a key-value cache, which some models cannot fill.
        if table is None:
            original.run(batch, model)
        else:
            original.logits(batch, model)

    progress("checking", 0, 2)
    errors = measure_errors(original, edited, held, table, batch_size)
    size = {
        "parameters": [measure.count_parameters(original.model), measure.count_parameters(edited)],
        "flops": [measure.count_flops(model, item, forward) for model in (original.model, edited)],
        "bytes": [measure.stored_bytes(original.model), measure.stored_bytes(edited)],
    }
    progress("checking", 1, 2)
    models = {"before": original.model, "after": edited}
    if exact is not None:
        models["exact"] = exact
    latency = compare_latency(models, item, lambda model, batch: original.run(batch, model), rounds=9)
    progress("checking", 2, 2)
    return {
        "errors": errors,
        "values": original.gives_values,
        "size": size,
        "throughput": _throughput(table),
        "latency": {name: vars(value) for name, value in latency.items()},
        "conditions": _conditions(original, held, latency["after"]),
    }


def measure_errors(
    original: LoadedModel, edited: nn.Module, held: Samples, table: HeldOut | None, batch_size: int
) -> dict[str, Any]:
    """What an edit does to the outputs, of all samples and of those of every source; arguments as in `measure_run`."""
    errors: dict[str, Any] = {"n": len(held)} if table is None else _errors(original, held, table)
    errors["agreements"] = agreements(original, edited, held, batch_size)
    if table is not None and held.sources:
        errors["sources"] = [
            {"source": source.name, "share": source.share, **_errors(original, held.subset(units), table.subset(units))}
            for number, source in enumerate(held.sources)
            if (units := [i for i, own in enumerate(held.origin) if own == number])
        ]
    return errors


def _conditions(original: LoadedModel, held: Samples, latency: Latency) -> str:
    """What was timed on what, as a sentence."""
    what = f"a window of {len(held.load(0))} tokens" if original.reads_tokens else "one input"
    threads = f"{latency.threads} thread{'s' if latency.threads > 1 else ''}"
    where = f", {threads}" if latency.device == "cpu" else ""
    logits = ", with the logits of the last token" if last_logits(original.model) else ""
    return f"A sample is {what}; times are those of eager PyTorch on {device_name(latency.device)}{where}{logits}."


def _errors(original: LoadedModel, held: Samples, table: HeldOut) -> dict[str, Any]:
    """What the table of the outputs on ``held`` says of the edit."""
    errors = table.summary()
    if original.kind == "text":
        errors["perplexity_before"], errors["perplexity_after"] = table.perplexities()
    if held.labels is not None and table.top_before is not None and not original.gives_values:
        errors["accuracy_before"], errors["accuracy_after"] = table.accuracies(held.labels)
    return errors


def _throughput(table: HeldOut | None) -> dict[str, float] | None:
    """Items a second of both models in their pass over the held-out samples; None where too few batches tell noise."""
    if table is None or len(table.seconds) < FEWEST_BATCHES:
        return None
    before, after = ([1 / pair[side] for pair in table.seconds] for side in (0, 1))
    relative = ratio(after, before)
    return {
        "before": Spread.of(before).median,
        "after": Spread.of(after).median,
        "ratio": relative.median,
        "ratio_iqr": relative.iqr,
    }


def before_after(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report's table of figures before and after the edit."""

    def row(name: str, before: float | None, after: float | None, unit: str = "", **more: Any) -> dict[str, Any]:
        return {"name": name, "before": before, "after": after, "unit": unit, **more}

    errors, size, latency, throughput = report["errors"], report["size"], report["latency"], report["throughput"] or {}

    def quality(errors: dict[str, Any], where: str = "") -> list[dict[str, Any]]:
        """Those of one set of samples: the model's quality, where it is known, and the agreement."""
        if report.get("values"):
            return [row(f"{EXPLAINED}{where}", 1.0, errors["explained"], "%")]
        if "perplexity_before" in errors:
            first = row(f"perplexity{where}", errors["perplexity_before"], errors["perplexity_after"])
        else:
            accuracies = (errors.get("accuracy_before"), errors.get("accuracy_after"))
            why = "no labels" if None in accuracies else None
            first = row(f"top-1 accuracy{where}", *accuracies, "%", change=why)
        agreement = f"{'next-token ' if 'perplexity_before' in errors else ''}agreement with the original{where}"
        return [first, row(agreement, 1.0, errors["agreement"], "%")]

    sizes = [
        row("FLOPs per sample", *size["flops"]),
        row("parameters", *size["parameters"]),
        row(
            LATENCY,
            latency["before"]["median"],
            latency["after"]["median"],
            "s",
            ratio=latency["after"]["ratio"],
            spread=latency["after"]["ratio_iqr"],
        ),
        row(
            THROUGHPUT,
            throughput.get("before"),
            throughput.get("after"),
            ratio=throughput.get("ratio"),
            spread=throughput.get("ratio_iqr"),
            change=None if throughput else f"needs {FEWEST_BATCHES} full batches held out",
        ),
        row("size of the weights", size["bytes"][0], size["bytes"][1], "B"),
    ]
    more = [row(name, 1.0, share, "%") for name, share in errors.get("agreements", {}).items()]
    if "relative_error" not in errors:
        return [*more, *(row(f"{name} an item", *counts) for name, counts in report["entries"].items()), *sizes]
    by_source = [line for own in errors.get("sources", []) for line in quality(own, f", {own['source']}")]
    return [*quality(errors), *by_source, *more, *sizes]


def summary(report: dict[str, Any]) -> str:
    """The first line of a report: what is left of the work, and of the time that it takes."""
    before, after = report["size"]["flops"]
    latency, throughput = report["latency"]["after"], report["throughput"]
    flops = f"{after / before:.2f}x of the FLOPs, " if before else ""
    text = f"{flops}{latency['ratio']:.2f} ± {latency['ratio_iqr']:.2f}x of the time of one sample"
    if throughput is not None:
        text += f", {1 / throughput['ratio']:.2f}x of that of many"
    return text
