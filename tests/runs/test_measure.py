from __future__ import annotations

import re

import timm
import torch
from torch import Tensor, nn

import modhifi
from modhifi.runs import measure


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    assert measure.count_parameters(nn.Sequential(first, second, nn.Linear(3, 2))) == 9 + 8


def test_flops_of_a_convolution_count_a_multiply_add_twice_and_one_item() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    expected = 2 * (8 * 4 * 4) * (2 * 9) + 2 * 128 * 5
    assert measure.count_flops(model, torch.zeros(7, 4, 8, 8)) == expected


def test_flops_include_attention() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    # (heads, tokens, width) = (2, 5, 3): scores and values, each 2·T·T·width a head.
    assert measure.count_flops(Attention(), torch.randn(4, 2, 5, 3)) == 2 * (2 * 2 * 5 * 5 * 3)


def test_flops_leave_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure.count_flops(model, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_features_are_not_judged_by_their_largest() -> None:
    model = timm.create_model("resnet18", num_classes=0, stem_width=8, channels=(8, 8, 8, 8)).eval()
    pruned = modhifi.prune(
        model, torch.randn(24, 3, 32, 32), ratio=0.3, samples=16, evaluation_samples=8, checks={"walked": 0}
    )
    names = [row["name"] for row in pruned.report["before_after"]]
    assert names[0].startswith("outputs, share") and not [name for name in names if re.search("top-1|agreement", name)]
    assert "top-1" not in pruned.report["outcome"]["text"] and "their spread" in pruned.report["outcome"]["text"]


class Seen(nn.Module):
    """A net that counts the items which it, and every copy of it, reads in batches: times are those of single items."""

    items = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        Seen.items += len(x) if len(x) > 1 else 0
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_measuring_and_bounding_cost_at_most_three_passes_over_the_held_out_data() -> None:
    held, before = 200, dict[str, int]()
    cost = dict[str, int]()

    def progress(stage: str, done: int, total: int) -> None:
        if done == 0:
            before[stage] = Seen.items
        cost[stage] = Seen.items - before.get(stage, 0)

    torch.manual_seed(0)
    images = torch.randn(held + 40, 3, 8, 8)
    given = {"samples": 40, "evaluation_samples": held, "batch_size": 40, "checks": {"walked": 0}}
    result = modhifi.prune(Seen().eval(), images, ratio=0.5, **given, progress=progress)
    assert result.report["errors"]["n"] == held
    assert 2 * held <= cost["measure"] + cost["bound"] <= 3 * held
