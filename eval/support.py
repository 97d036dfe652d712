"""Which models of timm and torchvision can modhifi prune, and does the cut model compute what it should?

    python eval/support.py                        # all of them; writes eval/results/support.md and support.json
    python eval/support.py --missing --minutes 8  # those without a row, as far as the minutes reach
    python eval/support.py resnet18 torchvision:vgg11     # some of them, printed only

No weights are downloaded: normalisation statistics, affine parameters and layer scales are drawn at random, so that
nothing is trivially zero. For each architecture the groups are traced, all prunable ones are cut to 60 % at once, and
the outputs of the cut model are compared, in float64, with the full-size model whose readers see the same components
only (the mask oracle).
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
import platform
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from modhifi.models.standardised import with_plain_weights
from modhifi.structure.groups import Group, Structure
from modhifi.structure.outputs import difference, named_tensors
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import confirm

ARCHITECTURES = """
    resnet18 resnet50 resnet26t resnext50_32x4d wide_resnet50_2 seresnet50 ecaresnet26t skresnet18 resnest14d
    resnetv2_50 resnetblur50 gernet_s nf_resnet26 botnet26t_256 vgg16_bn densenet121 dpn48b dla34
    hrnet_w18_small cspresnet50 cspdarknet53 vovnet39a ese_vovnet19b_dw selecsls42b inception_v3
    legacy_xception xception41 mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100 mobilenetv3_large_100
    mobilenetv4_conv_small mobileone_s0 repvgg_a0 mnasnet_100 semnasnet_075 fbnetc_100 spnasnet_100 lcnet_050
    tinynet_e mixnet_s ghostnet_100 ghostnetv2_100 repghostnet_050 rexnet_100 efficientnet_b0 efficientnet_es
    tf_efficientnet_lite0 tf_efficientnetv2_b0 regnetx_002 regnety_008 regnetz_005 convnext_atto
    convnextv2_atto inception_next_atto edgenext_xx_small fastvit_t8 starnet_s1 hgnetv2_b0 repvit_m0_9
""".split()

# The smallest of every family of timm that is none of these; DeepSeek's ViT, of 412 million parameters, is left out.
FAMILIES = """
    beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 cpubone_nano crossvit_tiny_240 csatv2
    cspnext_tiny davit_tiny deit_tiny_patch16_224 efficientformer_l1 efficientformerv2_s0 efficientvim_m1
    efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m
    hardcorenas_b hiera_tiny_224 sam2_hiera_tiny iformer_t inception_resnet_v2 inception_v4 lcnetv2_small levit_128s
    lowformer_b0 mambaout_femto maxvit_pico_rw_256 caformer_s18 mixer_s16_224 mobilenetv5_base mobilevit_xxs
    mvitv2_tiny naflexvit_base_patch16_siglip nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_xs_224
    pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny res2net50_14w_8s resnetv2_18 legacy_seresnet18 sequencer2d_s
    shvit_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
    vit_srelpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224 xcit_nano_12_p8_224
""".split()
# The smallest of every family of torchvision: classification, segmentation, detection.
TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5
    squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_16 wide_resnet50_2
    deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large
    fasterrcnn_mobilenet_v3_large_320_fpn fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn
    retinanet_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large
""".split()
EVERY = (*ARCHITECTURES, *FAMILIES, *(f"torchvision:{name}" for name in TORCHVISION))

CUT = 0.6
TOLERANCE = 1e-9
# A cut that changes an output by less proves nothing.
LEAST_CHANGE = 1e-6
RECORD = Path(__file__).parent / "results" / "support.json"


@dataclass(frozen=True)
class Support:
    """What was found for one architecture; ``touched`` is a share of its conv and linear weights."""

    architecture: str
    resolution: int | None = None
    parameters: int = 0
    parameters_after: int = 0
    touched: float = 0.0
    prunable: int = 0
    refused: int = 0
    oracle_error: float | None = None
    change: float | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    failure: str | None = None


def visible(model: nn.Module) -> nn.Module:
    """Nothing that hides all the rest, in double precision.

    A head of zeros puts out zeros whatever is cut, and a detector whose biases are set to see nothing sees nothing.
    """
    for name, parameter in model.named_parameters():
        constant = parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
        if constant and (parameter.ndim > 1 or name.endswith("bias")):
            parameter.data.normal_(0, 0.02)
    return model.eval().requires_grad_(False).double()


def randomise(model: nn.Module) -> nn.Module:
    """Random normalisation statistics and affine parameters; layer scales near one."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    for module in visible(model).modules():
        if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight.uniform_(0.5, 1.5)
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias.normal_(0, 0.1)
        for name in ("gamma", "ls1", "ls2", "layer_scale"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                getattr(module, name).uniform_(0.5, 1.5)
    return model


def built(name: str) -> tuple[nn.Module, int]:
    """A model of random weights, and the resolution that it is made for."""
    library, _, leaf = name.rpartition(":")
    if not library:
        model = with_plain_weights(timm.create_model(leaf, pretrained=False))  # as it is when it is loaded
        return randomise(model), model.pretrained_cfg["input_size"][-1]
    takes = inspect.signature(torchvision.models.get_model_builder(leaf)).parameters
    options: dict[str, Any] = {"weights_backbone": None, "num_classes": 5} if "weights_backbone" in takes else {}
    model = torchvision.models.get_model(leaf, weights=None, **options)
    # Boxes of a detector whose norms are drawn come in an order that rounding decides.
    disturb = visible if hasattr(torchvision.models.detection, leaf) else randomise
    return disturb(model), 320 if "320" in leaf else 224


def runnable(model: nn.Module, own: int) -> Tensor:
    """A batch of two at 96 pixels, or at the model's own resolution if it does not run at 96."""
    for size in (96, own):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        try:
            model(x)
            return x
        except (RuntimeError, AssertionError, ValueError):
            if size == own:
                raise
    raise AssertionError


def cut(group: Group) -> tuple[int, ...]:
    """A random 60 % of a group's components, equally many per part, at least one of each and never all."""
    labels = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
    kept: list[int] = []
    for label in labels.unique():
        mine = torch.nonzero(labels == label).flatten()
        step = group.multiple
        count = max(step, min(len(mine) - step, int(CUT * len(mine)) // step * step))
        kept += mine[torch.randperm(len(mine))[:count]].tolist()
    return tuple(sorted(kept))


def touched_share(model: nn.Module, structure: Structure) -> float:
    places = {piece.module for group in structure.prunable for piece in group.slices}
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    weights = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, kinds)}
    return sum(n for name, n in weights.items() if name in places) / sum(weights.values())


def reasons_of(structure: Structure) -> dict[str, int]:
    """How many groups each reason refuses, the reasons without the places they were met at."""
    count: Counter[str] = Counter()
    for group in structure.refused:
        bare = (re.sub(r" \([^()]*\)$|(?<=weight) of \S+", "", part) for part in str(group.refused).split("; "))
        count.update(set(bare))
    return dict(count.most_common())


@torch.no_grad()
def examine(name: str) -> Support:
    """Trace one architecture and hold its cut version against the oracle."""
    torch.manual_seed(0)
    try:
        model, size = built(name)
        x = runnable(model, size)

        def run(model: nn.Module) -> dict[str, Tensor]:
            return dict(named_tensors(model(x)))

        structure = confirm(model, trace(model, run), run)
        plan = Plan({group.name: cut(group) for group in structure.prunable})
        dense, masked = run(model), run(mask_readers(model, structure, plan))
        small = shrink(copy.deepcopy(model), structure, plan)
        outputs = run(small)
        error = max(difference(outputs[key], masked[key]) for key in masked)
        change = max(difference(dense[key], masked[key]) for key in dense.keys() & masked.keys())
    except Exception as problem:  # the table is to show what fails, whatever it is
        return Support(name, failure=f"{type(problem).__name__}: {str(problem).splitlines()[0]}")
    return Support(
        architecture=name,
        resolution=x.shape[-1],
        parameters=sum(p.numel() for p in model.parameters()),
        parameters_after=sum(p.numel() for p in small.parameters()),
        touched=touched_share(model, structure),
        prunable=len(structure.prunable),
        refused=len(structure.refused),
        oracle_error=error if plan.kept else None,
        change=change,
        reasons=reasons_of(structure),
    )


def tells(row: Support) -> bool:
    """Whether what was cut changes the output."""
    return row.change is not None and row.change > LEAST_CHANGE


def line(row: Support) -> str:
    if row.failure:
        return f"| {row.architecture} | | | | | failed | {row.failure} |"
    reasons = {k: v for k, v in row.reasons.items() if k != "these channels are the model's output"}
    why = "; ".join(f"{reason} ({number})" for reason, number in reasons.items())
    oracle = "nothing to cut" if row.oracle_error is None else f"{row.oracle_error:.0e}"
    if row.oracle_error is not None and not tells(row):
        oracle = "outputs do not depend on it"
    return (
        f"| {row.architecture} | {row.resolution} | {row.parameters / 1e6:.2f} → {row.parameters_after / 1e6:.2f} | "
        f"{100 * row.touched:.0f} % | {row.prunable} / {row.refused} | {oracle} | {why} |"
    )


def table(rows: list[Support]) -> str:
    passed = [r for r in rows if r.oracle_error is not None and r.oracle_error <= TOLERANCE and tells(r)]
    tried, vision = (sum(r.architecture.startswith("torchvision:") for r in some) for some in (rows, passed))
    return "\n".join(
        [
            "# Supported models of timm and torchvision",
            "",
            f"Written by `python eval/support.py` (timm {timm.__version__}, torchvision {torchvision.__version__}, "
            f"torch {torch.__version__}, Python {platform.python_version()}). {len(rows)} of {len(EVERY)} models, "
            f"random weights; {len(passed)} have prunable groups and pass the oracle: {len(passed) - vision} of "
            f"{len(rows) - tried} of timm, with one of each of its families, and {vision} of {tried} of torchvision.",
            "",
            "* **parameters**: in millions, dense and with every prunable group cut to 60 %.",
            "* **share**: of all conv and linear weights, those in layers that at least one prunable group writes,",
            "  reads or passes along (such a layer gets smaller when that group does).",
            "* **groups**: prunable / refused. The group of the class scores is always refused.",
            f"* **oracle**: relative difference, float64, between the cut model and the full-size one masked at its "
            f"readers; to pass, at most {TOLERANCE:.0e}, where the cut changes the output at all "
            f"(by {LEAST_CHANGE:.0e}).",
            "* **refused because**: reasons other than being the model's output, with the number of groups (a group",
            "  can have several).",
            "",
            "| architecture | pixels | parameters | share | groups | oracle | refused because |",
            "|---|---:|---:|---:|---:|---:|---|",
            *map(line, rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="timm's names, or torchvision:NAME (default: the lists in this file)")
    parser.add_argument(
        "--missing", action="store_true", help="only models without a row, whose rows are written among the results"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further model after so long")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.names and not arguments.missing:
        print(table([examine(name) for name in arguments.names]))
        return
    rows: dict[str, Support] = {}
    if arguments.missing and RECORD.is_file():
        rows = {entry["architecture"]: Support(**entry) for entry in json.loads(RECORD.read_text())["rows"]}
    end = time.monotonic() + 60 * arguments.minutes
    for name in arguments.names or EVERY:
        if name not in rows and time.monotonic() < end:
            rows[name] = examine(name)
            print(line(rows[name]), file=sys.stderr, flush=True)
            write([rows[name] for name in EVERY if name in rows])
    wrong = [r.architecture for r in rows.values() if r.failure or (r.oracle_error or 0) > TOLERANCE]
    if wrong:
        raise SystemExit(f"failed: {', '.join(wrong)}")


def write(rows: list[Support]) -> None:
    """Write what is known so far."""
    record = {"timm": timm.__version__, "torchvision": torchvision.__version__, "torch": torch.__version__}
    RECORD.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    RECORD.write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
