"""Measures of agreement against brute force, and what they are for equal and for other outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from modhifi.runs.reports.agreements import boxes, edit_distances, embeddings, masks, transcripts


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def levenshtein(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        before, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(before[j] + (x != y), before[j + 1] + 1, row[j] + 1))
    return row[-1]


def test_edit_distances_are_levenshtein() -> None:
    sizes = [(0, 3), (5, 5), (7, 2), (4, 0), (0, 0), (9, 12)]
    pairs = [[torch.randint(4, (n,), generator=chance().manual_seed(n + m)) for n in (n, m)] for n, m in sizes]
    pairs += [[torch.randint(3, (8,), generator=chance().manual_seed(s + t)) for t in (0, 40)] for s in range(20)]
    first, second = zip(*pairs, strict=True)
    expected = [levenshtein(a.tolist(), b.tolist()) for a, b in pairs]
    assert edit_distances(list(first), list(second)).tolist() == expected


def model(name: str, **config: Any) -> Any:
    kind = type(name, (nn.Module,), {})
    built = kind()
    built.config = SimpleNamespace(**config)
    return SimpleNamespace(model=built)


def detections(seed: int, count: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    outputs = {}
    for item in range(2):
        corner = torch.rand(count, 2, generator=draw)
        outputs[f"{item}.boxes"] = torch.cat([corner, corner + torch.rand(count, 2, generator=draw)], 1)
        outputs[f"{item}.scores"] = torch.rand(count, generator=draw)
        outputs[f"{item}.labels"] = torch.randint(2, (count,), generator=draw)
    return outputs


def test_box_overlaps_are_those_of_torchvision() -> None:
    before, after = detections(0, 6), detections(1, 9)
    (shares,) = boxes(model("Detector"), before, after).values()
    for item in range(2):
        ours, theirs = ({k: side[f"{item}.{k}"] for k in ("boxes", "scores", "labels")} for side in (before, after))
        overlap = torchvision.ops.box_iou(ours["boxes"].double(), theirs["boxes"].double())
        best = torch.stack([(row * (theirs["labels"] == ours["labels"][i])).max() for i, row in enumerate(overlap)])
        assert shares[item] == pytest.approx(float((best * ours["scores"]).sum() / ours["scores"].sum()), rel=1e-6)
    (same,) = boxes(model("Detector"), before, before).values()
    torch.testing.assert_close(same, torch.ones(2, dtype=torch.float64))
    nothing = detections(0, 0)
    assert next(iter(boxes(model("Detector"), nothing, nothing).values())).isnan().all()
    assert next(iter(boxes(model("Detector"), before, nothing).values())).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("classes", [4, 3])  # with a column for no object, and without
def test_boxes_of_queries_are_read(classes: int) -> None:
    logits, middle = torch.randn(2, 5, classes, generator=chance()), torch.rand(2, 5, 4, generator=chance())
    outputs = {"logits": logits, "pred_boxes": middle}
    (shares,) = boxes(model("ForObjectDetection", num_labels=3), outputs, outputs).values()
    torch.testing.assert_close(shares, torch.ones(2, dtype=torch.float64))
    moved = {"logits": logits, "pred_boxes": middle + torch.tensor([5.0, 0, 0, 0])}
    assert next(iter(boxes(model("ForObjectDetection", num_labels=3), outputs, moved).values())).tolist() == [0.0, 0.0]


def test_mask_overlaps_by_brute_force() -> None:
    before, after = (torch.randn(3, 4, 5, 6, generator=chance().manual_seed(s)) for s in (0, 1))
    (shares,) = masks(model("ForSemanticSegmentation"), {"logits": before}, {"logits": after}).values()
    for item in range(3):
        ours, theirs = before[item].argmax(0), after[item].argmax(0)
        overlaps = [
            float(((ours == c) & (theirs == c)).sum() / ((ours == c) | (theirs == c)).sum()) for c in ours.unique()
        ]
        assert float(shares[item]) == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-6)
    assert masks(model("ForImageClassification"), {"logits": before}, {"logits": after}) == {}


def test_transcripts_collapse_repeats_and_blanks() -> None:
    def logits(rows: list[list[int]]) -> dict[str, Tensor]:
        return {"logits": torch.nn.functional.one_hot(torch.tensor(rows), 4).float()}

    before, after = logits([[1, 1, 0, 1, 2, 2], [3, 3, 3, 0, 0, 0]]), logits([[1, 0, 0, 1, 3, 3], [3, 0, 0, 0, 0, 0]])
    (shares,) = transcripts(model("Wav2Vec2ForCTC", pad_token_id=0), before, after).values()
    torch.testing.assert_close(shares, torch.tensor([2 / 3, 1.0], dtype=torch.float64))
    assert transcripts(model("WhisperForConditionalGeneration"), before, after) == {}


def test_embeddings_of_both_towers() -> None:
    before = {name: torch.randn(4, 8, generator=chance()) for name in ("image_embeds", "text_embeds")}
    shares = embeddings(model("CLIPModel"), before, {k: 3 * v for k, v in before.items()})
    assert set(shares) == {"cosine of image embeddings", "cosine of text embeddings"}
    assert all(bool(torch.allclose(v, torch.ones(4, dtype=torch.float64))) for v in shares.values())
