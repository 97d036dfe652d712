"""`modhifi score`: the fidelity of every component, as a table or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DeviceOption,
    JsonOption,
    QuietOption,
    SeedOption,
    print_json,
    progress,
    resolve_device,
    stdout_console,
)
from .prune import (
    DataOption,
    GgufOption,
    ModelArgOption,
    ModelArgument,
    RandomOption,
    RevisionOption,
    SamplesOption,
    TrustOption,
    WeightsOption,
    WindowOption,
    model_source,
)


def score(
    model: ModelArgument,
    data: DataOption = "synthetic",
    samples: SamplesOption = None,
    window: WindowOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write FILE.json, FILE.csv or FILE.safetensors.")] = None,
    model_arg: ModelArgOption = None,
    weights: WeightsOption = None,
    revision: RevisionOption = None,
    random_weights: RandomOption = False,
    trust_remote_code: TrustOption = False,
    gguf_file: GgufOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure every component: singleton fidelity, energy score, exact removal cost, order of removal."""
    from modhifi.disk import check_file
    from modhifi.runs.inputs import load_source
    from modhifi.runs.recipe import ModelSource
    from modhifi.runs.score import score_model, write_scores

    check_file(out, "--out", json="all", csv="a table", safetensors="tensors")
    source = model_source(model, model_arg, weights, revision, random_weights, trust_remote_code, gguf_file)
    with progress(quiet or as_json) as report:
        loaded = load_source(ModelSource(**source))
        loaded.model.to(resolve_device(device))
        scores = score_model(loaded, data, samples, seed, report, window)
    if out is not None:
        write_scores(scores, out)
    if as_json:
        print_json([s.to_json() for s in scores])
        return
    from rich.table import Table

    table = Table("group", "components", "best singleton", "mean singleton", "free to remove", "half costs")
    for s in scores:
        table.add_row(
            s.group,
            str(len(s.singleton)),
            f"{float(s.singleton.max()):.3f}",
            f"{float(s.singleton.mean()):.3f}",
            str(s.free()),
            f"{s.half_cost():.2%} of the energy",
        )
    stdout_console().print(table)
