"""`modhifi audit`: attack a model that was made to forget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DeviceOption, JsonOption, QuietOption, SeedOption, print_json, progress, resolve_device
from .unlearn import ForgetDataOption, ForgetOption, MembersOption, ReferenceOption, show_audit


def audit(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="What `modhifi unlearn` wrote, or any model.")],
    data: Annotated[str, typer.Option("--data", help="Images that the edit did not see: images:DIR or hf:DATASET.")],
    forget: ForgetOption = None,
    original: Annotated[
        str | None,
        typer.Option("--original", metavar="MODEL", help="The model before the edit; the manifest knows it."),
    ] = None,
    forget_data: ForgetDataOption = None,
    reference: ReferenceOption = None,
    members: MembersOption = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Number of images, half for attacks to learn.")
    ] = 2000,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the report as FILE.json or FILE.html.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2)] = 64,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Try to get forgotten classes back: norms re-estimated, probes, neighbours, prototypes; beside an output mask."""
    import json

    from modhifi.artifacts.report import render_html
    from modhifi.disk import check_file, jsonable
    from modhifi.runs.audit import run_audit

    check_file(out, "--out", json="figures", html="a page")
    with progress(quiet or as_json) as report:
        result = run_audit(
            directory,
            source=data,
            forget_names=forget or [],
            original=original,
            forget_source=forget_data,
            reference=reference,
            members=members,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            device=resolve_device(device),
            progress=report,
        )
    if out is not None:
        page = render_html(result) if out.suffix == ".html" else json.dumps(jsonable(result), indent=1) + "\n"
        out.write_text(page, encoding="utf-8")
    if as_json:
        print_json(result)
    else:
        show_audit(result, None)
