"""`modhifi data make`: write down, and look at, the samples that a run would use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modhifi.data.contact_sheet import materialise, save_sheet
from modhifi.data.quality import look
from modhifi.data.sources import load_samples
from modhifi.disk import check_file, check_output
from modhifi.runs.devices import resolve_device
from modhifi.runs.inputs import load_source
from modhifi.staging import staging

from .common import (
    DeviceOption,
    JsonOption,
    QuietOption,
    SeedOption,
    print_json,
    print_warnings,
    progress,
    stdout_console,
)
from .options import Loading, takes

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Calibration data: make it, look at it.")


@app.callback()
def data() -> None:
    """Calibration data: make it, look at it."""


@app.command("make")
@takes(Loading, files=False)
def make(
    chosen: Loading,
    out: Annotated[
        Path,
        typer.Option("--out", help="A new directory; images:OUT or text:OUT reads it back.", rich_help_panel="Output"),
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="synthetic\\[:KIND], synthetic:invert, self, or another source of `modhifi prune`.",
            rich_help_panel="Data",
        ),
    ] = "synthetic",
    n: Annotated[int, typer.Option("--n", min=1, help="Number of samples.", rich_help_panel="Data")] = 256,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            min=2,
            help="Tokens in a window of text; by default 1024 (512 on a CPU).",
            rich_help_panel="Data",
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", help="Also draw the first images into one PNG.", rich_help_panel="Output"),
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the samples of a source as files, images or texts, and say how well they suit the model."""
    check_output(out)
    check_file(sheet, "--sheet", within=out, png="an image")
    with progress(quiet or as_json) as report:
        loaded = load_source(chosen.model)
        print_warnings(loaded.warnings)
        loaded.model.to(resolve_device(device))
        samples = load_samples(kind, loaded, n=n, seed=seed, window=window, progress=report)
        quality = look(loaded, samples)
        with staging(out) as directory:
            written = len(materialise(samples, loaded, directory))
        if sheet is not None:
            save_sheet(samples, loaded, sheet)
    facts = {
        "path": str(out),
        "samples": len(samples),
        "files": written,
        "description": samples.description,
        "fingerprint": samples.fingerprint(),
        "skipped": [list(item) for item in samples.skipped],
        **{key: value for key, value in quality.items() if key != "norm_gap"},
    }
    if as_json:
        print_json(facts)
        return
    console = stdout_console()
    console.print(f"{samples.description}; fingerprint {samples.fingerprint()}", highlight=False)
    if "mean_norm_gap" in quality:
        console.print(
            f"distance to what the norms remember: {quality['mean_norm_gap']:.3g} (0: the same mean and deviation)"
        )
    if "classes" in quality:
        predicted, classes = quality["classes"]
        console.print(f"predicted classes: {predicted} of {classes}, balance {quality['balance']:.2f}")
    console.print(f"written: {out}", soft_wrap=True)
