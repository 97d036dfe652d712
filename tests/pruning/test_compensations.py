from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_readers import TINY, reader
from torch import Tensor, nn

from modhifi.calibration.moments import Moments
from modhifi.errors import ModhifiError
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.compensations.lstsq import least_squares, least_squares_towards
from modhifi.pruning.editing import edit_reader
from modhifi.pruning.elimination import eliminate
from modhifi.pruning.local_error import local_error
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.tracing.tracer import trace

quick = settings(max_examples=15, deadline=None, derandomize=True)


def draw(seed: int, d: int = 8, out: int = 3, rows: int = 80) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated rows ``(r, d)`` with a mean, a weight ``(out, d)`` and a mask ``(d,)`` that keeps some columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(d, d, generator=generator, dtype=torch.float64) + 2
    kept = torch.rand(d, generator=generator) < 0.6
    kept[0] = True
    return x, torch.randn(out, d, generator=generator, dtype=torch.float64), kept


def gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x.T @ (x if y is None else y) / len(x)


@dataclass(frozen=True)
class Case:
    """Rows ``(r, d)``, a weight ``(out, d)``, blocks ``(n, m)`` of which ``kept`` ``(n,)`` stay, and all that stays."""

    x: Tensor
    weight: Tensor
    blocks: Tensor
    kept: Tensor

    @property
    def stay(self) -> list[int]:
        gone = self.blocks[~self.kept].reshape(-1).tolist()
        return [column for column in range(self.x.shape[1]) if column not in gone]


CASES = {
    "scattered blocks": torch.tensor([[0, 4], [1, 5], [7, 2], [6, 3]]),
    "single columns": torch.arange(8)[:, None],
    "columns outside": torch.tensor([[0, 4], [1, 5], [2, 6]]),
    "single columns and some outside": torch.tensor([[5], [1], [0], [7]]),
}


def case(kind: str) -> Case:
    x, weight, _ = draw(3)
    return Case(x, weight, CASES[kind], torch.arange(len(CASES[kind])) % 3 != 1)


def regression(c: Case) -> Tensor:
    result = torch.zeros_like(c.weight)
    result[:, c.stay] = torch.linalg.lstsq(c.x[:, c.stay], c.x @ c.weight.T).solution.T
    return result


def scalars(c: Case) -> Tensor:
    """Each kept block times the scalar that a regression of the blocks' output on the kept contributions finds."""
    result = mask(c)
    for channel, row in enumerate(c.weight):
        parts = (c.x * row)[:, c.blocks].sum(2)
        best = torch.linalg.lstsq(parts[:, c.kept], parts.sum(1, keepdim=True)).solution.flatten()
        for block, scale in zip(c.blocks[c.kept], best, strict=True):
            result[channel, block] = row[block] * scale
    return result


def mask(c: Case) -> Tensor:
    result = torch.zeros_like(c.weight)
    for column in c.stay:
        result[:, column] = c.weight[:, column]
    return result


EXPECTED: dict[str, Callable[[Case], Tensor]] = {"lstsq": regression, "delta": scalars, "none": mask}


def test_every_compensation_that_comes_with_the_package_is_checked() -> None:
    assert set(EXPECTED) <= set(COMPENSATIONS)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", EXPECTED)
def test_the_weights_are_those_of_the_definition_on_raw_rows(name: str, kind: str) -> None:
    c = case(kind)
    edited = COMPENSATIONS[name].edit(c.weight, gram(c.x), c.blocks, c.kept, 1e-12)
    torch.testing.assert_close(edited, EXPECTED[name](c), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", COMPENSATIONS)
def test_what_goes_is_zero_and_who_stays_whole_stays_as_it_is(name: str, kind: str) -> None:
    c, edit = case(kind), COMPENSATIONS[name].edit
    before = c.weight.clone()
    edited = edit(c.weight, gram(c.x), c.blocks, c.kept, 1e-4)
    assert edited.shape == c.weight.shape and edited.dtype == torch.float64
    assert not edited[:, c.blocks[~c.kept].reshape(-1)].any()
    whole = edit(c.weight, gram(c.x), c.blocks, torch.ones_like(c.kept), 1e-4)
    torch.testing.assert_close(whole, c.weight)
    assert torch.equal(c.weight, before)


@pytest.mark.parametrize("kind", CASES)
def test_least_squares_beats_scalars_beats_nothing(kind: str) -> None:
    c = case(kind)
    lstsq, delta, none = (
        local_error(c.weight, COMPENSATIONS[name].edit(c.weight, gram(c.x), c.blocks, c.kept, 1e-12), gram(c.x))[0]
        for name in ("lstsq", "delta", "none")
    )
    assert lstsq <= delta * (1 + 1e-6) and delta <= none * (1 + 1e-6)


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_elimination_finds_the_weights_of_those_that_are_least_squares(name: str) -> None:
    r, compensation = reader(1), COMPENSATIONS[name]
    trial = eliminate([r], keep_at_least=1, order=torch.arange(6), ridge=TINY, steps=100, trial=3).trial
    assert trial is not None
    edited = compensation.edit(r.weight[0], r.second[0], r.columns, torch.arange(6) >= 3, TINY)
    assert torch.allclose(trial.weights[0][0].double(), edited, rtol=1e-4, atol=1e-4) == compensation.least_squares


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", COMPENSATIONS)
def test_a_reader_is_edited_about_its_mean_where_a_bias_can_take_it_and_about_zero_elsewhere(
    name: str, bias: bool
) -> None:
    """Weights, bias and the reported error, all on raw rows with a large mean."""
    model = tiny.randomise(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias))).double()
    structure = trace(model, lambda model: model(torch.randn(2, 4).double()))
    x = torch.cat([draw(seed)[0] + 20 for seed in range(100)])
    layer = model[2]
    assert isinstance(layer, nn.Linear)
    before = layer(x).detach()
    weight, moments = layer.weight.detach().clone(), Moments(len(x), x.mean(0)[None], gram(x - x.mean(0))[None])
    gone, compensation = torch.tensor([1, 6]), COMPENSATIONS[name]
    settings = PruneSettings(compensate=name, ridge=1e-9)
    reported = edit_reader(model, structure, "2", gone, moments, settings)
    change = (layer(x) - before).detach()
    centred = change - change.mean(0) if bias else change
    energy = (before - before.mean(0) if bias else before).square().sum(1).mean()
    assert reported.error == pytest.approx(float(centred.square().sum(1).mean()), rel=1e-6)
    assert reported.energy == pytest.approx(float(energy), rel=1e-6)
    if bias:
        assert (float(change.mean(0).norm()) < 1e-6) == compensation.restores_mean
    if compensation.least_squares:
        rows = x - x.mean(0) if bias else x
        kept = [0, 2, 3, 4, 5, 7]
        expected = torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution.T
        # shrinkage leaves a trace
        torch.testing.assert_close(layer.weight.detach()[:, kept], expected, rtol=0.02, atol=0.02)


@quick
@given(st.integers(0, 10_000))
def test_least_squares_on_the_gram_is_least_squares_on_the_rows(seed: int):
    x, weight, kept = draw(seed)
    edited = least_squares(weight, gram(x), kept, ridge=1e-12)
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(edited[:, kept], expected, rtol=1e-5, atol=1e-6)
    assert not edited[:, ~kept].any()


@quick
@given(st.integers(0, 10_000))
def test_least_squares_on_the_covariance_is_a_regression_with_intercept(seed: int):
    x, weight, kept = draw(seed)
    mean = x.mean(0)
    edited = least_squares(weight, gram(x - mean), kept, ridge=1e-12)
    design = torch.cat([x[:, kept], torch.ones(len(x), 1).double()], 1)
    expected = torch.linalg.lstsq(design, x @ weight.T).solution.T
    torch.testing.assert_close(edited[:, kept], expected[:, :-1], rtol=1e-5, atol=1e-6)
    shift = (weight - edited) @ mean  # what a bias takes
    torch.testing.assert_close(shift, expected[:, -1], rtol=1e-5, atol=1e-5)
    assert local_error(weight, edited, gram(x - mean))[0] == pytest.approx(
        float((x @ weight.T - x @ edited.T - shift).square().sum(1).mean()), rel=1e-6, abs=1e-9
    )


@quick
@given(st.integers(0, 10_000), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_the_ridge_minimises_what_it_says(seed: int, ridge: float):
    """``tr[(W−Ŵ) S (W−Ŵ)ᵀ] + λ‖W_K − Ŵ_K‖²`` has no slope at the answer."""
    x, weight, kept = draw(seed)
    second = gram(x)
    edited = least_squares(weight, second, kept, ridge)
    slope = ((edited - weight) @ second + ridge * second.diagonal().mean() * (edited - weight) * kept)[:, kept]
    assert slope.abs().max() < 1e-8 * second.diagonal().mean() * weight.abs().max() * len(weight)


def test_another_target_regresses_the_dense_output_on_the_pruned_input():
    dense, weight, kept = draw(5)
    pruned = dense + 0.3 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edited = least_squares_towards(weight, gram(dense, pruned), gram(pruned), kept, ridge=1e-12)
    expected = torch.linalg.lstsq(pruned[:, kept], dense @ weight.T).solution.T
    torch.testing.assert_close(edited[:, kept], expected, rtol=1e-5, atol=1e-6)


def test_keeping_everything_changes_nothing():
    x, weight, kept = draw(1)
    torch.testing.assert_close(least_squares(weight, gram(x), torch.ones_like(kept)), weight)


def test_dead_columns_cost_nothing():
    x, weight, _ = draw(2)
    x[:, 3] = 0
    kept = torch.arange(8) != 3
    edited = least_squares(weight, gram(x), kept)
    assert local_error(weight, edited, gram(x))[0] == pytest.approx(0, abs=1e-12)
    # kept but dead: the ridge alone holds the weight, it does not explode
    kept = torch.arange(8) < 4
    torch.testing.assert_close(least_squares(weight, gram(x), kept)[:, 3], weight[:, 3])


def test_an_input_without_any_energy_keeps_the_weights():
    _, weight, kept = draw(6)
    edited = least_squares(weight, torch.zeros(8, 8).double(), kept)
    torch.testing.assert_close(edited, weight * kept)


def test_damping_grows_where_rounding_spoils_the_factorisation():
    _, weight, kept = draw(0)
    second = torch.ones(8, 8).double()
    second[0, 1] = second[1, 0] = 1.001  # slightly indefinite
    kept[:] = True
    assert torch.isfinite(least_squares(weight, second, kept, ridge=1e-4)).all()
    with pytest.raises(ModhifiError, match="use more calibration samples"):
        least_squares(weight, -second, kept)
