"""`modhifi demo`: the main job on a small real model and real images that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DeviceOption, ForceOption, JsonOption, QuietOption, print_json, progress, resolve_device
from .prune import show


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")] = Path("modhifi-demo"),
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Prune the bundled CIFAR-10 ResNet to half its FLOPs and report what that did; offline, on any CPU."""
    import shlex
    import sys

    from modhifi.runs.prune import run_prune
    from modhifi.runs.recipe import parse_recipe

    recipe = parse_recipe(
        {
            "model": {"name": "demo:resnet"},
            "data": {
                "source": "demo:calibration",
                "samples": 500,
                "evaluate": "demo:test",
                "evaluation_samples": 500,
            },
            "budget": {"flops": "0.5x"},
            "batch_size": 100,
            "out": str(out),
        }
    )
    with progress(quiet or as_json) as report:
        result = run_prune(
            recipe,
            device=resolve_device(device),
            force=force,
            progress=report,
            command=shlex.join(["modhifi", *sys.argv[1:]]),
        )
    if not result.report:
        return  # the main process of several goes on
    if as_json:
        print_json({**result.report, "path": str(result.path)})
    else:
        show(result.report, result.path)
        seconds = result.report["timing"]
        typer.echo(f"took {sum(seconds.values()):.0f} s, of which pruning {seconds['prune']:.0f} s")
    if result.bounds is not None:
        result.bounds.enforce()
