"""Ranks of values: which model types have them, and what fewer of them keep of real attention layers.

    MODHIFI_DATA=DIR python eval/ranks.py MODEL ...        # writes eval/results/ranks.md and .json
    python eval/ranks.py --part families [TYPE ...]        # writes eval/results/ranks_families.md and .json

MODEL is a language model or encoder that `modhifi.load_model` reads. Nothing is cut, as the code of few models can have
values of another width than keys. Every head keeps as many dimensions of its values; half of the windows of WikiText-2
(``$MODHIFI_DATA/wikitext2-valid.txt``) chooses them, the other half says what is lost.
Families are model types of transformers, built tiny (eval/tiny_configs.py), and models of timm, with random weights.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from common import wikitext_file, write_results
from tiny_configs import build, livelier
from torch import Tensor

from modhifi.calibration.sampling import Sampling
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.stock import can_say
from modhifi.pruning.rank_basis import by_head, leading_basis
from modhifi.pruning.readers import second_of
from modhifi.pruning.stages import measure_moments
from modhifi.structure.groups import Structure
from modhifi.structure.operators import weight_matrix
from modhifi.structure.ranks import confirm_ranks, ends_of
from modhifi.structure.tracing.tracer import trace, trace_ranks

SHARES = (0.75, 0.5, 0.25)
WINDOWS, TOKENS, RIDGE = 32, 128, 1e-4
LEADING, PRODUCT, CHANNELS = "leading ranks", "SVD of the product of weights", "channels of most energy"
FITTED = ", then least squares"
# Of latent attention and others whose values have a width of their own, the best known of all kinds, models of timm.
TYPES = (
    "deepseek_v2 deepseek_v3 minicpm3 glm4_moe_lite longcat_flash youtu mimo_v2_flash perceiver deberta-v2 deberta "
    "llama mistral qwen3 gemma3_text phi3 gpt_neox falcon gpt2 opt bert roberta distilbert albert vit clip t5 bart "
    "whisper timm:tiny_vit_5m_224 timm:efficientformer_l1 timm:mobilenetv4_hybrid_medium timm:levit_128s "
    "timm:vit_tiny_patch16_224 timm:swin_tiny_patch4_window7_224"
).split()


def bases(loaded: LoadedModel, group: Any, second: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The columns ``(H Q, n)`` of what reads the values, and by method a basis of each head's, best first."""
    ends = ends_of(loaded.model, group)
    assert ends is not None
    weight, own = by_head(ends, second)
    made = weight_matrix(ends.writer)[0][ends.rows]
    energy = weight.square().sum(1) * own.diagonal(dim1=1, dim2=2)
    choice = torch.eye(group.n, dtype=torch.float64)[energy.argsort(1, descending=True)]
    by_method = {
        LEADING: leading_basis(weight, own, RIDGE),
        PRODUCT: leading_basis(weight, made @ made.mT, RIDGE),
        CHANNELS: (choice, choice.mT),
    }
    repeated = {name: tuple(m.repeat_interleave(ends.queries, 0) for m in pair) for name, pair in by_method.items()}
    return ends.columns, repeated  # type: ignore[return-value]


def lost(weight: Tensor, change: Tensor, second: Tensor) -> float:
    """The share of the output's energy that a change of the weights is."""
    return float(((change @ second) * change).sum() / ((weight @ second) * weight).sum())


def layer(weight: Tensor, columns: Tensor, basis: tuple[Tensor, Tensor], seen: Tensor, held: Tensor) -> Iterator[float]:
    """What a share of the ranks loses of the held-out energy of one layer, as they are and after least squares."""
    turns, back = basis
    for share in SHARES:
        rank = round(share * columns.shape[1])
        keep = torch.block_diag(*turns[:, :rank])  # (H r, H n)
        order = columns.flatten()
        own, seen_here, held_here = weight[:, order], seen[order][:, order], held[order][:, order]
        yield lost(own, own - own @ torch.block_diag(*back[:, :, :rank]) @ keep, held_here)
        cross, inner = own @ seen_here @ keep.mT, keep @ seen_here @ keep.mT
        inner.diagonal().add_(RIDGE * inner.diagonal().mean())
        yield lost(own, own - torch.linalg.solve(inner, cross.mT).mT @ keep, held_here)


def energies(name: str) -> list[dict[str, Any]]:
    """A row for each share of ranks, with the mean over the layers of what each method loses."""
    loaded = load_model(name)
    file = wikitext_file()
    samples = load_samples(f"text:{file}", loaded, n=2 * WINDOWS, window=TOKENS)
    run = partial(loaded.outputs, loaded.example)
    structure = replace(trace(loaded.model, run), groups=trace_ranks(loaded.model, run))
    seen, held = (
        measure_moments(loaded, structure, half, Sampling(None, 8, 0)) for half in samples.split(WINDOWS, WINDOWS)
    )
    figures: dict[str, list[list[float]]] = {}
    for group in structure.prunable:
        reader = group.readers[0].module
        sink = structure.operators[reader].sink
        first, second = (second_of(moments[reader], sink)[0] for moments in (seen, held))
        weight = weight_matrix(loaded.model.get_submodule(reader))[0]
        columns, by_method = bases(loaded, group, first)
        for method, basis in by_method.items():
            figures.setdefault(method, []).append(list(layer(weight, columns, basis, first, second)))
    means = {method: torch.tensor(values).mean(0).view(-1, 2).tolist() for method, values in figures.items()}
    label = {"model": Path(name).parent.name or name, "layers": len(structure.prunable)}
    return [
        label
        | {"ranks kept": share}
        | {method: 100 * values[row][0] for method, values in means.items()}
        | {method + FITTED: 100 * values[row][1] for method, values in means.items()}
        for row, share in enumerate(SHARES)
    ]


def family(name: str) -> dict[str, Any]:
    """What becomes of the ranks of one model type: how many groups may go, can stock code say it, or why not."""
    kind, _, timm_name = name.partition("timm:")
    loaded = load_model(build(kind) if kind else livelier(timm.create_model(timm_name)))
    run = partial(loaded.outputs, loaded.example)
    structure = confirm_ranks(loaded.model, Structure(()), trace_ranks(loaded.model, run), run)
    stock = bool(structure.prunable) and can_say(loaded, structure, "ranks")
    reasons = dict.fromkeys(str(group.refused) for group in structure.refused)
    counts = {"groups": len(structure.groups), "prunable": len(structure.prunable)}
    return counts | {"stock": stock, "reasons": list(reasons)}


def families(types: list[str]) -> None:
    rows = {name: family(name) for name in types}
    free = {name: row for name, row in rows.items() if row["prunable"]}
    kinds = {
        "ranks go, and the stock class loads the result": [n for n, row in free.items() if row["stock"]],
        "ranks go, and `modhifi.load` loads the result": [n for n, row in free.items() if not row["stock"]],
        "values are found, and all of them stay": [n for n, row in rows.items() if row["groups"] and n not in free],
        "no values inside heads are found": [n for n, row in rows.items() if not row["groups"]],
    }
    write_results(
        "ranks_families",
        [{"what": what, "types": len(names), "which": ", ".join(names)} for what, names in kinds.items()],
        ["what", "types", "which"],
        f"""# Model types whose values can have a width of their own
{len(rows)} types of transformers {transformers.__version__}, built tiny, and models of timm {timm.__version__}, with
random weights: which can lose ranks of their values (`--only ranks`).
Command: `python eval/ranks.py --part families`.""",
        **{"by type": rows},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models, or types of models")
    parser.add_argument("--part", choices=["energy", "families"], default="energy")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if arguments.part == "families":
        return families(arguments.names or TYPES)
    if not arguments.names:
        parser.error("name a model")
    rows = [row for name in arguments.names for row in energies(name)]
    methods = [method + end for end in ("", FITTED) for method in (LEADING, PRODUCT, CHANNELS)]
    write_results(
        "ranks",
        rows,
        ["model", "layers", "ranks kept", *methods],
        f"""# What fewer ranks of the values lose of an attention's output
Percent of the energy that the output projection puts out on {WINDOWS} held-out windows of {TOKENS} tokens (what a bias
gives back left out), the mean over the layers; {WINDOWS} others chose what stays. Every head keeps as many dimensions
of its values: the leading ranks, weighted by the Gram of what the projection reads; those of the plain singular value
decomposition of the product of value and output weights; or the channels of most energy. Least squares then solve the
projection anew, over all heads together.
Command: `python eval/ranks.py {" ".join("/".join(Path(name).parts[-2:]) for name in arguments.names)}`.""",
    )


if __name__ == "__main__":
    main()
