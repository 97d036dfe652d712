"""What pruning writes and reports, against brute force on the raw rows that its readers read."""

from __future__ import annotations

from itertools import product

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning import allocation
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.elimination import Curve
from modhifi.pruning.output_change import output_change
from modhifi.pruning.prune import prune_model
from modhifi.pruning.readers import applied_second
from modhifi.pruning.sensitivity import amplification
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import find_structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.tracing.tracer import trace

ROWS, WIDTH = 60, 12
EXACT = PruneSettings(rows_per_column=None, weighting="energy", ridge=1e-3, selector="magnitude")


def net(bias: bool) -> nn.Sequential:
    """A hidden layer whose mean is larger than its deviation, and a reader with or without a place for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5, bias=bias))
    model[0].bias.data.uniform_(1, 3)
    return model.eval()


def samples() -> Samples:
    items = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1))
    numbers = tuple(map(str, range(ROWS)))
    return Samples(lambda i: items[i], numbers, None, numbers, "rows", synthetic=False)


def loaded_net(bias: bool) -> tuple[LoadedModel, Tensor]:
    """The model and the rows ``(n, d)`` float64 that its second linear layer reads."""
    model = net(bias)
    inputs = next(samples().batches(ROWS))
    return load_model(model, example=inputs[:2]), model[1](model[0](inputs)).detach().double()


def oracle_share(second: Tensor, n: int) -> float:
    """Chen et al. 2010: how much of S gives way to a multiple of the identity."""
    d, trace, square = len(second), float(second.trace()), float((second @ second).trace())
    share = ((1 - 2 / d) * square + trace**2) / ((n + 1 - 2 / d) * (square - trace**2 / d))
    return min(1.0, share)


def regression(rows: Tensor, weight: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The best weights ``(out, k)`` of the kept columns: least squares on rows, shrinkage and ridge as further rows."""
    n, d = rows.shape
    second = rows.T @ rows / n
    share, scale = oracle_share(second, n), float(second.trace()) / d
    extra = torch.eye(d, dtype=torch.float64) * (share * scale + ridge * scale) ** 0.5
    design = torch.cat([rows * ((1 - share) / n) ** 0.5, extra])
    # What the kept columns should make: all of the rows' output, and their own part of the further rows.
    target = torch.cat([rows * ((1 - share) / n) ** 0.5, extra * kept]) @ weight.T
    return torch.linalg.lstsq(design[:, kept], target).solution.T


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("layout", ["global", "uniform"])
@pytest.mark.parametrize("sequential", [None, "own", "dense"])
def test_least_squares_and_its_error_are_those_of_the_raw_rows(bias: bool, layout: str, sequential: str | None) -> None:
    loaded, rows = loaded_net(bias)
    settings = PruneSettings(**{**vars(EXACT), "layout": layout, "sequential": sequential})
    pruned = prune_model(loaded, samples(), Budget("components", 0.5), settings)
    kept = torch.zeros(WIDTH, dtype=torch.bool)
    kept[list(pruned.plan.kept["0"])] = True
    assert int(kept.sum()) == WIDTH // 2
    before, after = loaded.model[2].weight.double(), pruned.model[2].weight.double()
    mean = rows.mean(0)
    # A bias takes the change of the mean; without one the rows count as they are.
    counted = rows - mean if bias else rows
    expected = regression(counted, before, kept, settings.ridge)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    (error,) = pruned.errors
    change = pruned.model[2](rows[:, kept].float()).double() - loaded.model[2](rows.float()).double()
    assert error.error == pytest.approx(float(change.square().sum(1).mean()), rel=1e-3)
    assert error.energy == pytest.approx(float((counted @ before.T).square().sum(1).mean()), rel=1e-4)
    if bias:
        torch.testing.assert_close(change.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("compensate", ["none", "delta"])
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_reported_errors_are_those_of_the_raw_rows(bias: bool, compensate: str) -> None:
    loaded, rows = loaded_net(bias)
    loaded.model[2].weight.data[0] = 0  # columns in use may hold zeros
    settings = PruneSettings(**{**vars(EXACT), "compensate": compensate})
    pruned = prune_model(loaded, samples(), Budget("components", 0.5), settings)
    kept = list(pruned.plan.kept["0"])
    before = loaded.model[2].weight.double()
    after = torch.zeros_like(before)
    after[:, kept] = pruned.model[2].weight.double()
    counted = rows - rows.mean(0) if bias else rows
    (error,) = pruned.errors
    assert error.error == pytest.approx(float((counted @ (before - after).T).square().sum(1).mean()), rel=1e-4)
    assert error.energy == pytest.approx(float((counted @ before.T).square().sum(1).mean()), rel=1e-4)
    if compensate == "none":
        assert torch.equal(after[:, kept], before[:, kept])


@pytest.mark.parametrize("sink", [None, "bias"])
def test_the_matrix_to_solve_with_is_the_gram_where_nothing_takes_the_mean(sink: str | None) -> None:
    _, rows = loaded_net(False)
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / ROWS
    second = covariance if sink else rows.T @ rows / ROWS
    share = oracle_share(second, ROWS)
    assert 0 < share < 1
    expected = (1 - share) * second + share * second.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    found = applied_second(Moments(ROWS, mean[None], covariance[None]), sink)
    torch.testing.assert_close(found[0], expected)


def test_the_change_of_the_output_is_the_divergence_from_the_dense_model() -> None:
    dense = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.4, 3.0]])
    changed = torch.tensor([[0.0, 1.0, -3.0], [0.5, 0.5, 0.5]])
    divergence = F.kl_div(changed.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    assert output_change(dense, changed) == pytest.approx(float(divergence), rel=1e-6)
    assert output_change(changed, dense) != pytest.approx(float(divergence), rel=0.1)
    assert output_change(dense[:, None], changed[:, None]) == pytest.approx(float(divergence), rel=1e-6)
    assert output_change(dense, dense) == 0
    half = (dense.half(), changed.half())
    assert output_change(*half) == output_change(*(logits.float() for logits in half))
    maps = [logits.T[None, :, :, None].expand(2, -1, -1, 4) for logits in (dense, changed)]  # with classes at axis 1
    assert output_change(*maps) == pytest.approx(float(divergence), rel=1e-6)


def test_the_change_of_values_is_the_share_of_their_variance_that_is_lost() -> None:
    chance = torch.Generator().manual_seed(0)
    dense, changed = 30 + torch.randn(2, 40, 1, generator=chance)
    lost = (dense - changed).square().mean() / dense.var(0, correction=0)
    assert output_change(dense, changed) == 0  # one number is a certain class
    assert output_change(dense, changed, values=True) == pytest.approx(float(lost), rel=1e-5)
    wide = [torch.randn(2, 5, 3, generator=chance) for _ in range(2)]
    rows = [x.reshape(10, 3) for x in wide]
    lost = (rows[0] - rows[1]).square().sum() / (rows[0] - rows[0].mean(0)).square().sum()
    assert output_change(*wide, values=True) == pytest.approx(float(lost), rel=1e-5)
    large = 1e6 + 3 * torch.randn(2, 64, 1, generator=chance)  # in float32, which resolves 0.06 there
    lost = (large[0] - large[1]).double().square().mean() / large[0].double().var(0, correction=0)
    assert output_change(*large, values=True) == pytest.approx(float(lost), rel=1e-3)
    alike = torch.full((4, 2), 3.0)  # no spread to compare with
    assert output_change(alike, alike + 0.3, values=True) == pytest.approx(0.01, rel=1e-5)
    assert output_change(alike, alike, values=True) == 0


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("compensate", ["lstsq", "none"])
def test_amplification_is_the_divergence_over_the_local_error(bias: bool, compensate: str) -> None:
    """One group by hand: half of its components go, 6 of 12."""
    loaded, rows = loaded_net(bias)
    settings = PruneSettings(**{**vars(EXACT), "compensate": compensate, "ridge": 1e-9})
    structure = find_structure(loaded)
    mean = rows.mean(0)
    moments = {"2": Moments(ROWS, mean[None], ((rows - mean).T @ (rows - mean) / ROWS)[None])}
    curves = removal_curves(loaded.model, structure, moments, settings)
    probe = next(samples().batches(20))
    found = amplification(loaded, structure, curves, moments, settings, probe, share=0.5)

    kept = torch.ones(WIDTH, dtype=torch.bool)
    kept[curves["0"].order[:6]] = False
    reader = loaded.model[2]
    weight = reader.weight.double()
    counted = rows - mean if bias else rows
    second = counted.T @ counted / ROWS
    share = oracle_share(second, ROWS)
    second = (1 - share) * second + share * second.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    best = torch.zeros_like(weight)
    best[:, kept] = regression(counted, weight, kept, 1e-9)
    # Curves price every compensation by least squares, in the matrix that was solved with.
    cost = float(((weight - best) @ second @ (weight - best).T).trace())
    written = best if compensate == "lstsq" else weight * kept
    takes_mean = bias and compensate == "lstsq"
    shift = (weight - written) @ mean if takes_mean else 0.0
    hidden = loaded.model[1](loaded.model[0](probe)).double()
    dense = hidden @ weight.T + (reader.bias.double() if bias else 0.0)
    changed = hidden @ written.T + (reader.bias.double() if bias else 0.0) + shift
    divergence = F.kl_div(changed.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    assert float(curves["0"].cost[6]) == pytest.approx(cost, rel=1e-3)
    assert found == {"0": pytest.approx(float(divergence) / cost, rel=1e-3)}


def test_the_papers_scalars_are_those_of_the_raw_patches() -> None:
    """A component of nine columns: ``δ* = 1 + (Q_CC + λI)⁻¹ Q_CC̄ 1``, λ in units of the mean diagonal of ``Q_CC``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.Flatten()).eval()
    images = torch.randn(40, 2, 5, 4)
    numbers = tuple(map(str, range(40)))
    data = Samples(lambda i: images[i], numbers, None, numbers, "images", synthetic=False)
    settings = PruneSettings(**{**vars(EXACT), "compensate": "delta", "ridge": 0.3})
    pruned = prune_model(load_model(model, example=images[:2]), data, Budget("components", 0.5), settings)
    kept = list(pruned.plan.kept["0"])
    gone = [i for i in range(6) if i not in kept]
    rows = F.unfold(model[1](model[0](images)), 3).transpose(1, 2).flatten(0, 1).detach().double()
    second = rows.T @ rows / len(rows)
    share = oracle_share(second, len(rows))
    second = (1 - share) * second + share * second.trace() / 54 * torch.eye(54, dtype=torch.float64)
    pieces = model[2].weight.flatten(2).detach().double()
    for channel, row in enumerate(pieces):
        q = torch.einsum("im,imjn,jn->ij", row, second.view(6, 9, 6, 9), row)
        own = q[kept][:, kept]
        damped = own + 0.3 * own.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
        scales = 1 + torch.linalg.solve(damped, q[kept][:, gone].sum(1))
        written = pruned.model[2].weight[channel].flatten(1).double()
        torch.testing.assert_close(written, row[kept] * scales[:, None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_naive_keeps_what_enters_a_channels_best_first_and_of_equals_the_most_faithful(bias: bool) -> None:
    loaded, _ = loaded_net(bias)
    # Two components alike make nearly all of one channel: the second is more faithful than others' best.
    loaded.model[0].weight.data[1] = loaded.model[0].weight[0] + 0.02
    loaded.model[2].weight.data[0] = torch.tensor([1.0, 0.9] + [1e-3] * (WIDTH - 2))
    rows = loaded.model[1](loaded.model[0](next(samples().batches(ROWS)))).detach().double()
    counted = rows - rows.mean(0) if bias else rows
    second = applied_second(Moments(ROWS, torch.zeros(1, WIDTH).double(), (counted.T @ counted / ROWS)[None]), None)[0]
    weight = loaded.model[2].weight.double()
    parts = weight[:, :, None] * second * weight[:, None, :]
    fidelity = parts.sum(2).square() / parts.diagonal(dim1=1, dim2=2) / parts.sum((1, 2))[:, None]
    # The first place that a component takes in any channel, counted from 0.
    places = fidelity.argsort(1, descending=True).argsort(1).amin(0)
    order = sorted(range(WIDTH), key=lambda i: (int(places[i]), -float(fidelity[:, i].max())))
    for keep in range(2, WIDTH):
        settings = PruneSettings(**{**vars(EXACT), "selector": "naive", "floor": 0.0})
        pruned = prune_model(loaded, samples(), Budget("components", keep / WIDTH), settings)
        assert set(pruned.plan.kept["0"]) == set(order[:keep])


# -- allocation --------------------------------------------------------------------------------------------------------
def widths_of(plan: Plan, names: list[str], n: int) -> list[int]:
    return [len(plan.kept.get(name, range(n))) for name in names]


@pytest.mark.parametrize("weights", [None, {"0": 0.3, "2": 2.0, "4": 1.0}])
def test_convex_costs_are_shared_out_as_well_as_can_be(weights: dict[str, float] | None) -> None:
    layers = [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).eval()
    structure = trace(model, lambda model: model(torch.randn(2, 4)))
    generator = torch.Generator().manual_seed(0)
    names = ["0", "2", "4"]
    curves = {
        name: Curve(
            torch.arange(16),
            torch.cat([torch.zeros(1), torch.rand(16, generator=generator)]).sort().values.cumsum(0).double(),
            energy,
        )
        for name, energy in zip(names, (1.0, 4.0, 0.5), strict=True)
    }
    rates = weights or {name: 1 / curve.energy for name, curve in curves.items()}

    def price(widths: tuple[int, ...]) -> float:
        return sum(
            float(curves[name].cost[16 - width]) * rates[name] for name, width in zip(names, widths, strict=True)
        )

    for total in range(12, 48, 3):
        plan = allocation.allocate(
            structure.prunable, curves, sizes_of(model, structure), Budget("components", total / 48), weights=weights
        )
        found = tuple(widths_of(plan, names, 16))
        options = [w for w in product(range(2, 17), repeat=3) if sum(w) == total]
        assert found in options and price(found) == pytest.approx(min(map(price, options)))


@pytest.mark.parametrize("measure", ["macs", "parameters"])
@pytest.mark.parametrize("name", ["plain", "gate", "grouped", "glu"])
def test_no_single_step_would_bring_an_allocation_nearer(name: str, measure: str) -> None:
    model, x = tiny.pattern(name)
    structure = trace(model, lambda model: model(x))
    sizes, groups = sizes_of(model, structure), structure.prunable
    costs = {g.name: torch.linspace(0, 1 + number, g.n + 1).double() ** 2 for number, g in enumerate(groups)}
    order = {g.name: torch.arange(g.n).view(g.step, -1).T.flatten() for g in groups}
    curves = {g.name: Curve(order[g.name][: -g.step], costs[g.name][: g.n - g.step + 1], 1.0) for g in groups}
    missed = 0
    for percent in range(30, 100):
        budget = Budget(measure, percent / 100)
        try:
            plan = allocation.allocate(groups, curves, sizes, budget)
        except ModhifiError:
            continue
        widths = {g.name: len(plan.kept.get(g.name, range(g.n))) for g in groups}
        target = percent / 100 * budget.size(sizes, {})
        miss = abs(budget.size(sizes, widths) - target)
        if miss > 0.005 * target:
            missed += 1
            for group, sign in product(groups, (-1, 1)):
                width = widths[group.name] + sign * group.step
                if max(group.step, 0.1 * group.n) <= width <= group.n:
                    assert abs(budget.size(sizes, {**widths, group.name: width}) - target) >= miss
    assert missed
