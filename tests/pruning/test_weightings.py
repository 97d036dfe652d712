"""Every weighting: the weights that it says it gives groups, and the widths that they lead to."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.sensitivity import TRIAL
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import find_structure
from modhifi.pruning.weightings import WEIGHTINGS

WIDTH, ROWS, NAMES = 12, 64, ("0", "2", "4")
# Without compensation a trial just loses columns.
SETTINGS = PruneSettings(compensate="none", floor=0.0)


def net() -> nn.Sequential:
    """Three hidden layers, of which the middle one matters least to the output."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 4)).eval()
    model[4].weight.data *= 0.3
    return model


def curves() -> dict[str, Curve]:
    """Convex costs of hand-made orders; the readers of the first group have the least energy."""
    result = {}
    for number, (name, energy) in enumerate(zip(NAMES, (0.5, 2.0, 4.0), strict=True)):
        generator = torch.Generator().manual_seed(number)
        steps = torch.rand(WIDTH, generator=generator, dtype=torch.float64).sort().values
        cost = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        result[name] = Curve(torch.randperm(WIDTH, generator=generator), cost, energy)
    return result


def divergence_per_cost(name: str, curve: Curve) -> float:
    """The divergence from the dense model when 3 of a group's 12 components go, over what they cost.

    64 samples and three groups are probed with ten samples.
    """
    removed = int(TRIAL * WIDTH)
    dense, cut = net(), net()
    cut[int(name) + 2].weight.data[:, curve.order[:removed]] = 0
    probe = inputs()[: ROWS // 6]
    logs = [model(probe).detach().double().log_softmax(-1) for model in (cut, dense)]
    return float(F.kl_div(*logs, log_target=True, reduction="batchmean")) / float(curve.cost[removed])


WEIGHTS: dict[str, Callable[[str, Curve], float]] = {
    "energy": lambda name, curve: 1 / curve.energy,
    "amplification": divergence_per_cost,
}


def inputs() -> torch.Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))


def widths_by(weighting: str, total: int) -> tuple[tuple[int, ...], list[tuple[str, int, int]]]:
    """The widths of the three groups that a weighting leads to, and the progress that it told of."""
    rows, numbers = inputs(), tuple(map(str, range(ROWS)))
    loaded = load_model(net(), example=rows[:2])
    samples = Samples(lambda i: rows[i], numbers, None, numbers, "rows", synthetic=False)
    zero = Moments(ROWS, torch.zeros(1, WIDTH).double(), torch.eye(WIDTH).double()[None])
    told: list[tuple[str, int, int]] = []
    planned = WEIGHTINGS[weighting].plan(
        loaded,
        find_structure(loaded),
        curves(),
        {str(int(name) + 2): zero for name in NAMES},
        samples,
        Budget("components", total / (3 * WIDTH)),
        SETTINGS,
        lambda stage, done, of: told.append((stage, done, of)),
    )
    assert planned.tried == {}
    return tuple(len(planned.plan.kept.get(name, range(WIDTH))) for name in NAMES), told


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_widths_are_the_best_for_the_weights(name: str) -> None:
    weights = {group: WEIGHTS[name](group, curve) for group, curve in curves().items()}

    def price(widths: tuple[int, ...]) -> float:
        return sum(
            weights[group] * float(curve.cost[WIDTH - width])
            for (group, curve), width in zip(curves().items(), widths, strict=True)
        )

    for total in range(9, 34, 4):
        options = [w for w in product(range(1, WIDTH + 1), repeat=3) if sum(w) == total]
        found, _ = widths_by(name, total)
        assert found in options and price(found) == pytest.approx(min(map(price, options)))


def test_weightings_differ_and_amplification_says_how_far_it_is() -> None:
    plans = {name: widths_by(name, 18) for name in WEIGHTINGS}
    assert len({widths for widths, _ in plans.values()}) == len(plans)
    assert plans["amplification"][1] == [("probing", number, 3) for number in range(4)]
