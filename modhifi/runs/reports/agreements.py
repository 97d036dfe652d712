"""How far two models agree where a largest logit says little: boxes, masks, transcripts, embeddings.

Each measure compares the outputs of both models on one batch: a share in [0, 1] of every item, 1 for equal outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modhifi.data.samples import Samples
from modhifi.models.loaded import EMBEDDINGS, LoadedModel

Outputs = Mapping[str, Tensor]
Measure = Callable[[LoadedModel, Outputs, Outputs], dict[str, Tensor]]
"""From both models' outputs to shares, float64 ``(items,)``, by name; none where the measure does not apply."""

BOX = re.compile(r"^(\d+)\.(boxes|scores|labels)$")


@torch.inference_mode()
def agreements(original: LoadedModel, edited: nn.Module, held: Samples, batch_size: int) -> dict[str, float]:
    """The mean of every measure that applies, over the held-out items for which it says something.

    Costs a pass of both models, of one batch where none applies; language models and timm's have nothing of the kind.
    """
    if original.reads_tokens or original.framework == "timm":
        return {}
    values: dict[str, list[Tensor]] = {}
    for batch in held.batches(batch_size):
        before, after = original.outputs(batch), original.outputs(batch, edited)
        for measure in MEASURES:
            for name, shares in measure(original, before, after).items():
                values.setdefault(name, []).append(shares.cpu())
        if not values:
            break
    means = {name: torch.cat(shares).nanmean() for name, shares in values.items()}
    return {name: float(mean) for name, mean in means.items() if bool(mean.isfinite())}


def boxes(loaded: LoadedModel, before: Outputs, after: Outputs) -> dict[str, Tensor]:
    """The best overlap of each box of the original with one of its label, weighted by the original's scores.

    NaN for an item in which neither model sees a box, 0 where one of the two alone does.
    """
    ours, theirs = _boxes_of(loaded, before), _boxes_of(loaded, after)
    if ours is None or theirs is None:
        return {}
    return {
        "box overlap (IoU) with the original": torch.stack([_overlap(*pair) for pair in zip(ours, theirs, strict=True)])
    }


Boxes = tuple[Tensor, Tensor, Tensor]
"""Corners ``(n, 4)``, labels ``(n,)`` and scores ``(n,)`` of one item."""


def _boxes_of(loaded: LoadedModel, outputs: Outputs) -> list[Boxes] | None:
    if {"pred_boxes", "logits"} <= outputs.keys() and outputs["logits"].ndim == 3:
        logits = outputs["logits"].double()
        shares = logits.softmax(-1)[..., :-1] if logits.shape[-1] > _classes(loaded) else logits.sigmoid()
        scores, labels = shares.max(-1)
        middle, half = outputs["pred_boxes"].double()[..., :2], outputs["pred_boxes"].double()[..., 2:] / 2
        return list(zip(torch.cat([middle - half, middle + half], -1), labels, scores, strict=True))
    items: dict[int, dict[str, Tensor]] = {}
    for name, tensor in outputs.items():
        if match := BOX.match(name):
            items.setdefault(int(match[1]), {})[match[2]] = tensor
    if not items or any(len(item) < 3 for item in items.values()):
        return None
    return [(item["boxes"].double(), item["labels"], item["scores"].double()) for _, item in sorted(items.items())]


def _classes(loaded: LoadedModel) -> int:
    return int(getattr(getattr(loaded.model, "config", None), "num_labels", 0))


def _overlap(before: Boxes, after: Boxes) -> Tensor:
    (ours, labels, scores), (theirs, others, _) = before, after
    if not len(ours) or not len(theirs):
        return torch.tensor(0.0 if len(ours) or len(theirs) else torch.nan, dtype=torch.float64, device=ours.device)
    corner = torch.minimum(ours[:, None, 2:], theirs[:, 2:]) - torch.maximum(ours[:, None, :2], theirs[:, :2])
    shared = corner.clamp_min(0).prod(-1)
    area, area_theirs = ((box[:, 2:] - box[:, :2]).prod(-1) for box in (ours, theirs))
    overlap = shared / (area[:, None] + area_theirs - shared).clamp_min(1e-12)
    best = (overlap * (labels[:, None] == others)).amax(1)
    return (best * scores).sum() / scores.sum().clamp_min(1e-12)


def masks(loaded: LoadedModel, before: Outputs, after: Outputs) -> dict[str, Tensor]:
    """The overlap of the regions of every class that the original sees: intersection over union, its mean."""
    if "Segmentation" not in type(loaded.model).__name__ and "out" not in before:
        return {}
    ours, theirs = (outputs.get("logits", outputs.get("out")) for outputs in (before, after))
    if ours is None or theirs is None or ours.ndim != 4:
        return {}
    regions = [nn.functional.one_hot(t.argmax(1).flatten(1), t.shape[1]).bool() for t in (ours, theirs)]
    shared, joined = (regions[0] & regions[1]).sum(1).double(), (regions[0] | regions[1]).sum(1).double()
    seen = regions[0].any(1)
    return {"mask overlap (IoU) with the original": (shared / joined.clamp_min(1) * seen).sum(1) / seen.sum(1)}


def transcripts(loaded: LoadedModel, before: Outputs, after: Outputs) -> dict[str, Tensor]:
    """One minus the edit distance of the greedy transcripts over the longer one's length, of CTC heads."""
    if not type(loaded.model).__name__.endswith("ForCTC"):
        return {}
    blank = int(getattr(loaded.model.config, "pad_token_id", 0) or 0)
    ours, theirs = ([_collapsed(row, blank) for row in outputs["logits"].argmax(-1)] for outputs in (before, after))
    lengths = torch.tensor([max(len(a), len(b), 1) for a, b in zip(ours, theirs, strict=True)], dtype=torch.float64)
    return {"transcript agreement (CTC)": 1 - edit_distances(ours, theirs) / lengths}


def _collapsed(tokens: Tensor, blank: int) -> Tensor:
    tokens = tokens.unique_consecutive()
    return tokens[tokens != blank].cpu()


def edit_distances(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Levenshtein distances of pairs of sequences, float64 ``(n,)``, all pairs at once, a token after the other."""
    ours, theirs = (
        pad_sequence(rows, batch_first=True, padding_value=fill) for rows, fill in ((first, -1), (second, -2))
    )
    sizes = [torch.tensor([len(row) for row in rows]) for rows in (first, second)]
    places = torch.arange(theirs.shape[1] + 1, dtype=torch.float64)
    row = places.expand(len(first), -1)
    table = [row]
    for at in range(ours.shape[1]):
        changed = row[:, :-1] + (ours[:, at, None] != theirs)
        best = torch.cat([row[:, :1] + 1, torch.minimum(row[:, 1:] + 1, changed)], 1)
        row = (best - places).cummin(1).values + places  # insertions, one after the other
        table.append(row)
    return torch.stack(table)[sizes[0], torch.arange(len(first)), sizes[1]]


def embeddings(loaded: LoadedModel, before: Outputs, after: Outputs) -> dict[str, Tensor]:
    """The cosine of each embedding with the original's, of models of two towers; below 0 counts as 0."""
    names = [name for name in EMBEDDINGS if name in before and before[name].ndim == 2]
    return {
        f"cosine of {name.partition('_')[0]} embeddings": nn.functional.cosine_similarity(
            before[name].double(), after[name].double()
        ).clamp_min(0)
        for name in names
    }


MEASURES: tuple[Measure, ...] = (boxes, masks, transcripts, embeddings)
