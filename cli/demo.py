"""`modhifi demo`: the main job on a small real model and real images that come with the package."""

from __future__ import annotations

import typer

from modhifi.runs.recipes.prune import PruneRecipe

from .common import ForceOption, JsonOption, QuietOption
from .options import takes
from .run import run

DEMO = {
    "model": {"name": "demo:resnet"},
    "data": {"source": "demo:calibration", "samples": 500, "evaluate": "demo:test", "evaluation_samples": 500},
    "budget": {"flops": "0.5x"},
    "batch_size": 100,
    "out": "modhifi-demo",
}


@takes(PruneRecipe, base=DEMO, only=("out", "device"), files=False)
def demo(
    recipe: PruneRecipe, quiet: QuietOption = False, as_json: JsonOption = False, force: ForceOption = False
) -> None:
    """Prune the bundled CIFAR-10 ResNet to half its FLOPs and report what that did; offline, on any CPU."""
    (done,) = run(recipe, quiet=quiet, as_json=as_json, force=force, no_cache=True)
    if not as_json:
        seconds = done.report["timing"]
        typer.echo(f"took {sum(seconds.values()):.0f} s, of which pruning {seconds['prune']:.0f} s")
