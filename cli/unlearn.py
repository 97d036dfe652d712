"""`modhifi unlearn`: make a classifier forget classes, and show by attack how much is really gone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modhifi.errors import ModhifiError

from .common import (
    MODEL_HELP,
    ConfidenceOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    MaxErrorOption,
    MaxFlipOption,
    NotASampleOption,
    QuietOption,
    SeedOption,
    WalkedOption,
    entries,
    print_json,
    progress,
    resolve_device,
)
from .prune import (
    GgufOption,
    ModelArgOption,
    RandomOption,
    RevisionOption,
    TrustOption,
    WeightsOption,
    model_source,
)
from .push import PushOption, check_pushed, pushed
from .summary import SummaryOption

if TYPE_CHECKING:
    from rich.console import Console

ForgetOption = Annotated[
    list[str] | None, typer.Option("--forget", metavar="CLASS", help="Index or name; several with commas, or repeated.")
]
ReferenceOption = Annotated[
    str | None, typer.Option("--reference", metavar="MODEL", help="A model retrained without the classes, to compare.")
]
MembersOption = Annotated[
    str | None, typer.Option("--members", help="Training images of the forgotten classes, for the membership attack.")
]
ForgetDataOption = Annotated[
    str | None, typer.Option("--forget-data", help="Samples of the forgotten classes; by default those in --data.")
]


def unlearn(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    forget: ForgetOption = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Images with the forgotten and other classes: images:DIR or hf:DATASET."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Number of images the edit sees.")] = 2000,
    forget_data: ForgetDataOption = None,
    evaluate: Annotated[
        str | None, typer.Option("--evaluate", help="Images for attacks and test; by default a part of --data.")
    ] = None,
    evaluation_samples: Annotated[int, typer.Option("--evaluation-samples", min=1)] = 2000,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help=f"How to forget: {', '.join(entries('modhifi.unlearning.methods'))}; head-mask is a control.",
        ),
    ] = "erase-writers",
    depth: Annotated[int | None, typer.Option("--depth", min=1, help="Blocks to edit, back from the head.")] = None,
    passes: Annotated[int | None, typer.Option("--passes", min=1, help="Times to go over them.")] = None,
    strength: Annotated[float | None, typer.Option("--strength", help="In the method's own unit.")] = None,
    retain_budget: Annotated[
        float | None,
        typer.Option("--retain-budget", help="Largest loss of retain accuracy, such as 0.01; weakens the edit to fit."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Edit operators of this pattern; repeat it.")] = None,
    settle: Annotated[
        bool, typer.Option("--settle/--no-settle", help="Give the BatchNorms behind the edit statistics that fit it.")
    ] = True,
    max_flip: MaxFlipOption = None,
    max_error: MaxErrorOption = None,
    confidence: ConfidenceOption = 0.95,
    not_a_sample: NotASampleOption = False,
    walked: WalkedOption = None,
    reference: ReferenceOption = None,
    members: MembersOption = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A YAML recipe; --set changes its values.")] = None,
    set_values: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=1", help="Change a recipe value.")
    ] = None,
    summary: SummaryOption = None,
    push_to_hub: PushOption = None,
    model_arg: ModelArgOption = None,
    weights: WeightsOption = None,
    revision: RevisionOption = None,
    random_weights: RandomOption = False,
    trust_remote_code: TrustOption = False,
    gguf_file: GgufOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2)] = 64,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Make a classifier forget classes with forward passes only, then attack the result. No proof of data deletion."""
    import shlex

    from modhifi.artifacts.summary import check_summary, write_summary
    from modhifi.runs.recipe_file import apply_overrides, read_yaml
    from modhifi.runs.run_recipe import require_forgotten
    from modhifi.runs.unlearn import run_unlearn
    from modhifi.runs.unlearn_recipe import parse_unlearn_recipe

    if recipe is not None:
        content = read_yaml(recipe)
        if model is not None:
            content["model"] = {**(content.get("model") or {}), "name": model}
    else:
        for name, value in (("MODEL", model), ("--forget", forget), ("--data", data)):
            if not value:
                raise ModhifiError(f"{name} is missing; try: modhifi unlearn MODEL --forget CLASS --data images:DIR")
        content = {
            "model": model_source(
                str(model), model_arg, weights, revision, random_weights, trust_remote_code, gguf_file
            ),
            "forget": forget,
            "data": {
                "source": data,
                "samples": samples,
                "forget": forget_data,
                "evaluate": evaluate,
                "evaluation_samples": evaluation_samples,
                "members": members,
            },
            "method": {
                "name": method,
                "depth": depth,
                "passes": passes,
                "strength": strength,
                "retain_budget": retain_budget,
                "only": only or [],
                "settle": settle,
            },
            "checks": {
                "max_flip": max_flip,
                "max_error": max_error,
                "confidence": confidence,
                "not_a_sample": not_a_sample,
                "walked": walked,
            },
            "reference": reference,
            "seed": seed,
            "batch_size": batch_size,
            "device": device,
        }
    if out is not None:
        content["out"] = str(out)
    content = apply_overrides(content, set_values or [])
    parsed = parse_unlearn_recipe(content, recipe or "the options")
    check_summary(summary, parsed.out)
    check_pushed(push_to_hub, parsed.out)
    with progress(quiet or as_json) as report:
        result = run_unlearn(
            parsed,
            device=resolve_device(parsed.device),
            force=force,
            progress=report,
            command=shlex.join(["modhifi", *sys.argv[1:]]),
        )
    if summary is not None:
        write_summary(summary, [("unlearn", result.report)])
    if as_json:
        print_json({**result.report, "path": str(result.path) if result.path else None})
    else:
        show_audit(result.report, result.path)
    if result.bounds is not None:
        result.bounds.enforce()
    require_forgotten(result.report)
    pushed(result.path, push_to_hub)


def show_audit(report: dict[str, Any], path: Path | None) -> None:
    """An audit on one screen."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for warning in report["warnings"]:
        console.print(f"[yellow]note:[/] {warning}", highlight=False)
    first = report["tables"][0]
    table = Table(*first["columns"], title=report["title"])
    for name, *values in first["rows"]:
        table.add_row(name, *("not measured" if v is None else f"{100 * v:.1f} %" for v in values))
    console.print(table)
    _by_class(console, next(t for t in report["tables"] if t["title"] == "Accuracy by class"), report)
    for verdict in report["verdicts"]:
        console.print(f"[bold]{verdict['verdict']}[/] ({verdict['name']}): {verdict['text']}", highlight=False)
    if path is not None:
        console.print(f"model and report: {path}/report.html", soft_wrap=True)


def _by_class(console: Console, table: dict[str, Any], report: dict[str, Any]) -> None:
    """The forgotten classes and the retained one that lost most."""
    forgotten = report["audit"]["forgotten"]
    kept = [row for row in table["rows"] if row[0] not in forgotten]
    worst = min(kept, key=lambda row: row[2] - row[1])
    console.print(
        f"worst retained class: {worst[0]}, {100 * worst[1]:.1f} % before, {100 * worst[2]:.1f} % after",
        highlight=False,
    )
    for moved in report["audit"]["moved"]:
        to = ", ".join(f"{name} {100 * share:.0f} %" for name, share in moved["to"].items())
        console.print(f"images of {moved['class']} are now called: {to}", highlight=False)
