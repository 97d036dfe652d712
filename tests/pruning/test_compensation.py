from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.pruning.compensation import error_and_energy, least_squares, least_squares_towards, masked, scaled
from modhifi.pruning.fidelity import compensation

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
    assert error_and_energy(weight, edited, gram(x - mean))[0] == pytest.approx(
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


@quick
@given(st.integers(0, 10_000))
def test_least_squares_beats_scalars_beats_nothing(seed: int):
    x, weight, kept = draw(seed, d=9)
    blocks = torch.arange(9).view(3, 3)
    wide = kept[:3].repeat_interleave(3)
    second = gram(x)
    errors = [
        error_and_energy(weight, edited, second)[0]
        for edited in (
            least_squares(weight, second, wide, ridge=1e-10),
            scaled(weight, second, blocks, kept[:3], ridge=0.0),
            masked(weight, wide),
        )
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-9 and errors[1] <= errors[2] * (1 + 1e-6) + 1e-9


def test_scaled_of_single_columns_is_the_papers_scalars():
    x, weight, kept = draw(4)
    second, blocks = gram(x), torch.arange(len(kept))[:, None]
    expected = torch.zeros_like(weight)
    expected[:, kept] = weight[:, kept] * compensation(weight, second, blocks, torch.nonzero(kept).flatten(), 1e-12)
    torch.testing.assert_close(scaled(weight, second, blocks, kept, ridge=1e-12), expected, rtol=1e-6, atol=1e-9)


def test_scaled_multiplies_each_block_by_its_scalar_and_leaves_other_columns():
    x, weight, _ = draw(3, d=8)
    blocks, kept = torch.tensor([[0, 4], [1, 5], [2, 6]]), torch.tensor([True, False, True])
    edited = scaled(weight, gram(x), blocks, kept, ridge=1e-4)
    scales = compensation(weight, gram(x), blocks, torch.tensor([0, 2]), ridge=1e-4)
    torch.testing.assert_close(edited[:, [0, 4]], weight[:, [0, 4]] * scales[:, :1])
    torch.testing.assert_close(edited[:, [2, 6]], weight[:, [2, 6]] * scales[:, 1:])
    assert not edited[:, [1, 5]].any()
    assert torch.equal(edited[:, [3, 7]], weight[:, [3, 7]])


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
    assert error_and_energy(weight, edited, gram(x))[0] == pytest.approx(0, abs=1e-12)
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
