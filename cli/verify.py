"""`modhifi verify`: how far did the outputs of an edited model move, and is that within a tolerance?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modhifi.data.sources import metavars

from .common import (
    ConfidenceOption,
    DeviceOption,
    JsonOption,
    MaxErrorOption,
    MaxFlipOption,
    MaxPerplexityOption,
    NotASampleOption,
    QuietOption,
    SeedOption,
    WalkedOption,
    print_json,
    progress,
    resolve_device,
    stdout_console,
)
from .prune import (
    GgufOption,
    ModelArgOption,
    RandomOption,
    RevisionOption,
    TrustOption,
    WeightsOption,
    WindowOption,
    model_source,
)
from .summary import SummaryOption


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An artefact of prune or unlearn.")],
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The original it was made from.")],
    data: Annotated[str, typer.Option("--data", help=f"Held-out data: {metavars()}.")],
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="Held-out samples; by default 1000 images, 32 windows (16 on a CPU)."),
    ] = None,
    window: WindowOption = None,
    walked: WalkedOption = None,
    max_flip: MaxFlipOption = None,
    max_error: MaxErrorOption = None,
    max_perplexity_ratio: MaxPerplexityOption = None,
    confidence: ConfidenceOption = 0.95,
    not_a_sample: NotASampleOption = False,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Also take samples that calibrated the model; bounds then mean less."),
    ] = False,
    summary: SummaryOption = None,
    model_arg: ModelArgOption = None,
    weights: WeightsOption = None,
    revision: RevisionOption = None,
    random_weights: RandomOption = False,
    trust_remote_code: TrustOption = False,
    gguf_file: GgufOption = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="By default 32 images or 4 windows.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bound how far an edited model's outputs moved: every rung labelled, with a verdict on each tolerance.

    Exit code 0 where every tolerance given is met, 1 where one is not or stays open, 3 if the self-test fails.
    """
    from modhifi.artifacts.summary import check_summary, write_summary
    from modhifi.bounds.verdicts import Tolerances
    from modhifi.runs.recipe import ModelSource
    from modhifi.runs.verify import verify_artifact

    check_summary(summary)
    source = model_source(against, model_arg, weights, revision, random_weights, trust_remote_code, gguf_file)
    with progress(quiet or as_json) as report:
        found = verify_artifact(
            directory,
            ModelSource(**source),
            data,
            Tolerances(max_flip, max_error, confidence, not_a_sample, max_perplexity_ratio),
            samples=samples,
            window=window,
            walked=walked,
            allow_overlap=allow_overlap,
            batch_size=batch_size,
            seed=seed,
            device=resolve_device(device),
            progress=report,
        )
    if summary is not None:
        write_summary(summary, [("verify", {"title": f"modhifi verify {directory}", **found.to_json()})])
    if as_json:
        print_json(found.to_json())
    else:
        show_bounds(f"how far the outputs of {directory} moved", found.to_json())
    found.enforce()


def show_bounds(title: str, found: dict[str, Any]) -> None:
    """The ladder and its verdicts on one screen."""
    from rich.table import Table

    console = stdout_console()
    for warning in found["bounds"]["warnings"]:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    table = Table("", "verdict", "", title=title)
    for row in found["verdicts"]:
        table.add_row(row["name"], row["verdict"], row["text"])
    console.print(table)
    layers = sorted(found["bounds"]["layers"], key=lambda layer: -layer["change"])
    if layers:
        spent = Table("layer", "own error", "change of the output", "amplification", "its global bound")
        for layer in layers[:10]:
            figures = (layer[k] for k in ("local", "change", "amplification", "constant"))
            spent.add_row(layer["where"] or "(top level)", *(_figure(f) for f in figures))
        console.print(spent)


def _figure(value: Any) -> str:
    return "not available" if not isinstance(value, int | float) else f"{value:.3g}"
