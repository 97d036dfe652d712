"""`modhifi prune`: one command from a model to a smaller one with its report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from modhifi.artifacts.exports import EXPORTS
from modhifi.data.sources import metavars
from modhifi.errors import ModhifiError

from .cache import CacheOption, NoCacheOption, cache_directory
from .common import (
    MODEL_HELP,
    ConfidenceOption,
    DeviceOption,
    ForceOption,
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
from .push import PushOption, check_pushed, pushed
from .summary import SummaryOption

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelArgOption = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="KEY=VALUE", help="Argument for timm.create_model; repeat it."),
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", metavar="FILE", help="A .safetensors or .pth file for timm:NAME.")
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.")]
RandomOption = Annotated[
    bool, typer.Option("--random-weights", help="Do not download weights; for structure and speed only.")
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
GgufOption = Annotated[str | None, typer.Option("--gguf-file", help="A GGUF file of the model; it is dequantised.")]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help=f"Calibration data: {metavars()}.",
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Calibration samples; by default 256 images, 128 windows (64 on a CPU)."),
]
WindowOption = Annotated[
    int | None,
    typer.Option("--window", min=2, help="Tokens in a window of text; by default 1024 (512 on a CPU)."),
]


def model_source(
    name: str,
    model_arg: list[str] | None,
    weights: str | None,
    revision: str | None,
    random_weights: bool,
    trust: bool,
    gguf_file: str | None,
) -> dict[str, Any]:
    """The recipe's `model` part; values of --model-arg are read as YAML."""
    import yaml

    args = {}
    for item in model_arg or []:
        key, found, value = item.partition("=")
        if not found or not key:
            raise ModhifiError(f"--model-arg takes KEY=VALUE, not {item!r}")
        args[key] = yaml.safe_load(value)
    return {
        "name": name,
        "args": args,
        "pretrained": not random_weights,
        "weights": weights,
        "revision": revision,
        "trust_remote_code": trust,
        "gguf_file": gguf_file,
    }


def prune(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write.")] = None,
    ratio: Annotated[str | None, typer.Option("--ratio", help="Share of components removed, such as 0.5.")] = None,
    params: Annotated[str | None, typer.Option("--params", help="Share of parameters kept, such as 0.5x.")] = None,
    flops: Annotated[str | None, typer.Option("--flops", help="Share of FLOPs kept, such as 0.5x.")] = None,
    kv_cache: Annotated[
        str | None, typer.Option("--kv-cache", help="Share of the KV cache kept, in whole KV groups, such as 0.5x.")
    ] = None,
    data: DataOption = "synthetic",
    samples: SamplesOption = None,
    window: WindowOption = None,
    evaluate: Annotated[
        str | None, typer.Option("--evaluate", help="Held-out data; by default a disjoint part of --data.")
    ] = None,
    evaluation_samples: Annotated[
        int | None,
        typer.Option(
            "--evaluation-samples", min=1, help="Held-out samples; by default 256 images, 32 windows (16 on a CPU)."
        ),
    ] = None,
    selector: Annotated[str, typer.Option("--selector", help="How components are chosen.")] = "obs",
    compensate: Annotated[str, typer.Option("--compensate", help="What makes up for the removed ones.")] = "lstsq",
    allocate: Annotated[
        str,
        typer.Option("--allocate", help="Weight of each group's error: its own energy, or its measured effect."),
    ] = "amplification",
    layout: Annotated[
        str | None,
        typer.Option("--layout", help="Allocate over all groups, or the same share each (default of transformers)."),
    ] = None,
    sequential: Annotated[
        Literal["own", "dense"] | None,
        typer.Option("--sequential", help="Re-collect on the pruned prefix, towards the layer's own or dense output."),
    ] = None,
    eta: Annotated[
        float | None, typer.Option("--eta", help="Instead of a budget: keep HiFi sets of this fidelity.")
    ] = None,
    floor: Annotated[float, typer.Option("--floor", help="Least share of a group that stays.")] = 0.1,
    round_to: Annotated[int, typer.Option("--round-to", min=1, help="Kept widths are multiples of this.")] = 1,
    ridge: Annotated[float, typer.Option("--ridge", help="Damping, in units of a Gram's mean diagonal.")] = 1e-4,
    rows_per_column: Annotated[
        int | None,
        typer.Option("--rows-per-column", min=0, help="Rows a Gram looks at per column; 0 takes all."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Prune only groups of this name pattern or kind (channels, neurons, heads)."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Leave groups of this pattern or kind alone.")
    ] = None,
    coupled: Annotated[
        bool, typer.Option("--coupled/--inner-only", help="Also prune channels coupled by residual additions.")
    ] = True,
    reestimate_bn: Annotated[
        bool, typer.Option("--reestimate-bn", help="Re-estimate BatchNorm on the calibration data (real data only).")
    ] = False,
    max_flip: MaxFlipOption = None,
    max_error: MaxErrorOption = None,
    max_perplexity_ratio: MaxPerplexityOption = None,
    confidence: ConfidenceOption = 0.95,
    not_a_sample: NotASampleOption = False,
    walked: WalkedOption = None,
    export: Annotated[
        list[str] | None,
        typer.Option("--export", help=f"Also write {' or '.join(EXPORTS)} into the artefact; repeat it."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A YAML recipe; --set changes its values.")] = None,
    set_values: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=1", help="Change a recipe value.")
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Replay a plan (JSON of --dry-run --json).")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the predicted size; write nothing.")
    ] = False,
    summary: SummaryOption = None,
    push_to_hub: PushOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    model_arg: ModelArgOption = None,
    weights: WeightsOption = None,
    revision: RevisionOption = None,
    random_weights: RandomOption = False,
    trust_remote_code: TrustOption = False,
    gguf_file: GgufOption = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=2, help="By default 32 images or 4 windows.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep weights in main memory; one block at a time visits the device.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Make a model physically smaller, without its training data, labels or gradients."""
    import shlex

    from modhifi.artifacts.summary import check_summary, write_summary
    from modhifi.calibration.cache import MomentCache
    from modhifi.runs.prune import run_prune
    from modhifi.runs.recipe import parse_recipe
    from modhifi.runs.recipe_file import apply_overrides, read_yaml

    if recipe is not None:
        content = read_yaml(recipe)
        if model is not None:
            content["model"] = {**(content.get("model") or {}), "name": model}
    elif model is None:
        raise ModhifiError("give a MODEL (timm:NAME, hf:ORG/NAME or a directory), or --recipe FILE")
    else:
        content = {
            "model": model_source(model, model_arg, weights, revision, random_weights, trust_remote_code, gguf_file),
            "data": {
                "source": data,
                "samples": samples,
                "evaluate": evaluate,
                "evaluation_samples": evaluation_samples,
                "window": window,
            },
            "budget": {"ratio": ratio, "params": params, "flops": flops, "kv_cache": kv_cache},
            "method": {
                "selector": selector,
                "compensate": compensate,
                "allocate": allocate,
                "layout": layout,
                "sequential": sequential,
                "eta": eta,
                "floor": floor,
                "round_to": round_to,
                "ridge": ridge,
                "rows_per_column": rows_per_column,
                "only": only or [],
                "exclude": exclude or [],
                "coupled": coupled,
                "reestimate_batchnorm": reestimate_bn,
            },
            "checks": {
                "max_flip": max_flip,
                "max_error": max_error,
                "max_perplexity_ratio": max_perplexity_ratio,
                "confidence": confidence,
                "not_a_sample": not_a_sample,
                "walked": walked,
            },
            "seed": seed,
            "batch_size": batch_size,
            "device": device,
            "offload": offload,
        }
    if out is not None:
        content["out"] = str(out)
    if plan is not None:
        content["plan"] = read_plan(plan)
    parsed = parse_recipe(apply_overrides(content, set_values or []), recipe or "the options")
    if parsed.out is None and not dry_run:
        raise ModhifiError("give --out DIR for the pruned model, or --dry-run to see the plan only")
    check_summary(summary, None if dry_run else parsed.out)
    check_pushed(push_to_hub, None if dry_run else parsed.out)
    kept = cache_directory(cache, no_cache)
    moments = None if kept is None else MomentCache(kept)
    with progress(quiet or as_json) as report:
        result = run_prune(
            parsed,
            device=resolve_device(parsed.device),
            dry_run=dry_run,
            force=force,
            cache=moments,
            export=tuple(export or []),
            progress=report,
            command=shlex.join(["modhifi", *sys.argv[1:]]),
        )
    if not result.report:
        return  # the main process of several goes on
    if summary is not None:
        write_summary(summary, [("prune", result.report)])
    if as_json:
        print_json({**result.report, "plan": result.plan.to_json(), "path": str(result.path) if result.path else None})
    else:
        show(result.report, result.path)
    if result.bounds is not None:
        result.bounds.enforce()
    pushed(result.path, push_to_hub)


def read_plan(path: Path) -> dict[str, Any]:
    """The components kept, group by group, from a plan or from the JSON of a dry run that holds one."""
    import json

    from modhifi.structure.plan import Plan

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(Plan.from_json(content.get("plan", content)).to_json()["kept"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModhifiError(f"{path} holds no plan ({error}); give the JSON of --dry-run --json") from None


def show(report: dict[str, Any], path: Path | None) -> None:
    """The run on one screen."""
    from rich.table import Table

    from modhifi.artifacts.report import change, number

    console = stdout_console()
    for warning in report["warnings"]:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if report["data"].get("moments"):
        console.print(report["data"]["moments"], highlight=False)
    if "before_after" in report:
        table = Table("", "before", "after", "change", title=report["title"])
        for row in report["before_after"]:
            values = (number(row["before"], row["unit"]), number(row["after"], row["unit"]))
            table.add_row(row["name"], *values, change(row))
        console.print(table)
        for verdict in report.get("verdicts", []):
            console.print(f"{verdict['verdict']} ({verdict['name']}): {verdict['text']}", highlight=False)
    else:
        table = Table("group", "kind", "components", "kept", "predicted local error", title=report["title"])
        for g in report["groups"]:
            table.add_row(g["name"], g["kind"], str(g["n"]), str(g["kept"]), f"{g['relative_error']:.3g}")
        console.print(table)
        reached = report["budget"]["reached"]
        console.print(
            f"predicted: {reached['macs']:.3f}x of the FLOPs, {reached['parameters']:.3f}x of the parameters, "
            f"{reached['components']:.3f}x of the components; nothing was written"
        )
    refused = [
        g for g in report["refused"] if "the model's output" not in g["reason"] and "on request" not in g["reason"]
    ]
    if refused:
        console.print(f"groups that cannot be pruned: {len(refused)}; `modhifi check` says why")
    if path is not None:
        console.print(f"model and report: {path}/report.html", soft_wrap=True)
