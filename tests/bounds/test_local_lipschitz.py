from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modhifi.bounds.local_lipschitz import attention_rule, cannot_flip, max_pool_rule, norm_rule, scores_rule
from modhifi.bounds.operator_norms import max_pool_constant
from modhifi.errors import ModhifiError

TRIALS = 10_000


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spread(generator: torch.Generator, n: int, low: float = -3, high: float = 1.5) -> Tensor:
    """Radii from 10^low to 10^high, evenly in the exponent."""
    return 10 ** (low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64))


def step(direction: Tensor, radius: Tensor) -> Tensor:
    """The direction stretched to the radius, over every axis that the radius does not have."""
    flat = direction.reshape(*radius.shape, -1)
    return (flat / flat.norm(dim=-1, keepdim=True).clamp(min=1e-12) * radius[..., None]).reshape(direction.shape)


def layer(z: Tensor, gamma: Tensor, eps: float, centred: bool) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], gamma, eps=eps) if centred else F.rms_norm(z, z.shape[-1:], gamma, eps)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_norms_are_never_below_sampled_truth(centred: bool, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    d = 6
    gamma = normal(generator, d)
    z = normal(generator, TRIALS, d) * spread(generator, TRIALS, -3, 1)[:, None]
    radius = spread(generator, TRIALS)
    bound = norm_rule(z, radius, gamma, eps, centred=centred)
    clean = layer(z, gamma, eps, centred)
    heaviest = torch.zeros(TRIALS, d, dtype=torch.float64)
    heaviest[:, gamma.abs().argmax()] = 1
    for direction in (normal(generator, TRIALS, d), -z, -z + 0.3 * normal(generator, TRIALS, d), heaviest):
        moved = (layer(z + step(direction, radius), gamma, eps, centred) - clean).norm(dim=1)
        assert bool((moved <= bound).all())
    # Small steps meet the rule: it is not loose without need.
    one, tiny = torch.ones(d, dtype=torch.float64), torch.full((TRIALS,), 1e-7, dtype=torch.float64)
    moved = layer(z + step(normal(generator, TRIALS, d), tiny), one, eps, centred) - layer(z, one, eps, centred)
    assert 0.95 < float((moved.norm(dim=1) / norm_rule(z, tiny, None, eps, centred=centred)).max()) < 1


def test_vectors_that_share_a_radius() -> None:
    generator = torch.Generator().manual_seed(1)
    z = normal(generator, TRIALS, 3, 4) * spread(generator, TRIALS * 3, -1, 1).reshape(TRIALS, 3, 1)
    radius = spread(generator, TRIALS)
    bound = norm_rule(z, radius, None, 1e-5, centred=True)
    assert bound.shape == radius.shape
    weakest = torch.zeros_like(z)
    weakest[torch.arange(TRIALS), z.std(-1).argmin(-1)] = normal(generator, TRIALS, 4)
    for direction in (normal(generator, TRIALS, 3, 4), weakest):
        moved = F.layer_norm(z + step(direction, radius), (4,)) - F.layer_norm(z, (4,))
        assert bool((moved.flatten(1).norm(dim=1) <= bound).all())
    with pytest.raises(ModhifiError, match="no axis"):
        norm_rule(z, torch.ones(TRIALS, 3, 4), None, 1e-5, centred=True)


def test_a_norm_far_from_zero_is_nearly_exact_and_zero_radius_moves_nothing() -> None:
    z = torch.full((1, 4), 100.0)
    assert float(norm_rule(z, torch.tensor([0.01]), None, 1e-6, centred=False)) == pytest.approx(1e-4, rel=1e-3)
    assert float(norm_rule(torch.zeros(1, 4), torch.zeros(1), None, 0.0, centred=False)) == 0


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_never_below_sampled_truth(causal: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    heads, tokens, e, scale = 2, 4, 3, 0.6
    q, k, v = (normal(generator, TRIALS, heads, tokens, e) * 2 for _ in range(3))
    rq, rk, rv = (spread(generator, TRIALS * heads * tokens, -3, 0.5).reshape(TRIALS, heads, tokens) for _ in range(3))
    allowed = torch.ones(tokens, tokens).tril().bool() if causal else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)

    scores = q @ k.mT * scale
    moved_scores = scores_rule(q, k, rq, rk, scale, allowed)
    bound = attention_rule(scores, v, moved_scores, rv, allowed)
    clean = attend(q, k, v)
    # Towards the key with the farthest value, away from the others: nearly the worst that scores can do.
    far = torch.cdist(clean, v).argmax(-1)
    towards = k.gather(2, far[..., None].expand(-1, -1, -1, e)) - k.mean(2, keepdim=True)
    for dq, dv in ((normal(generator, *q.shape), normal(generator, *q.shape)), (towards, v - clean), (q, -v)):
        dk = normal(generator, *k.shape)
        new_q, new_k = q + step(dq, rq), k + step(dk, rk)
        change = (new_q @ new_k.mT - q @ k.mT).abs() * scale
        change = change if allowed is None else change.masked_fill(~allowed, 0)
        assert bool((change.amax(-1) <= moved_scores).all())
        moved = attend(new_q, new_k, v + step(dv, rv)) - clean
        assert bool((moved.norm(dim=-1) <= bound).all())
    plain = rv.amax(-1, keepdim=True) + 2 * torch.tanh(moved_scores / 2) * torch.cdist(clean, v).amax(-1)
    assert bool((bound <= plain * (1 + 1e-8)).all())


def test_attention_meets_the_worst_case_of_two_keys() -> None:
    # Two opposite values, equal scores: shifting one up and the other down by r moves the output by 2 tanh(r / 2) / 2.
    scores, v = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0], [-1.0]]]])
    r = torch.full((1, 1, 1), 0.7, dtype=torch.float64)
    bound = float(attention_rule(scores, v, r, torch.zeros(1, 1, 2)))
    truth = float((torch.softmax(torch.tensor([0.7, -0.7]), 0) * torch.tensor([1.0, -1.0])).sum())
    assert bound == pytest.approx(2 * math.tanh(0.35)) and truth == pytest.approx(math.tanh(0.7))
    assert truth <= bound < 1.12 * truth


def test_masked_scores_and_empty_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    scores, v = normal(generator, 1, 1, 2, 3), normal(generator, 1, 1, 3, 2)
    v[..., 2, :] *= 1e6
    blocked = scores.clone()
    blocked[..., 2] = -math.inf
    r, rv = torch.full((1, 1, 2), 0.1), torch.tensor([[[0.1, 0.1, 9.0]]])
    allowed = torch.tensor([True, True, False])
    bound = attention_rule(blocked, v, r, rv)
    assert float(bound.max()) < 10 and torch.equal(bound, attention_rule(scores, v, r, rv, allowed))
    assert attention_rule(torch.full_like(scores, -math.inf), v, r, rv).tolist() == [[[0.0, 0.0]]]
    assert bool(torch.isfinite(attention_rule(scores, v, torch.full((1, 1, 2), 1e9), rv)).all())


def test_max_pooling_counts_only_candidates() -> None:
    generator = torch.Generator().manual_seed(8)
    z, radius = normal(generator, 3_000, 2, 5, 5), spread(generator, 3_000, -4, 1)
    bound = max_pool_rule(z, radius, 3, 2, 1)
    constant = max_pool_constant(3, 2)
    assert bool((bound <= radius * constant * (1 + 1e-8)).all())
    assert float((bound / radius).min()) == pytest.approx(math.sqrt(2), rel=0.3)
    clean, winners = F.max_pool2d(z, 3, 2, 1, return_indices=True)
    hits = torch.zeros(3_000, 2, 25, dtype=torch.float64)
    hits.scatter_add_(2, winners.flatten(2), torch.ones(winners.flatten(2).shape, dtype=torch.float64))
    busiest = (hits == hits.flatten(1).amax(1)[:, None, None]).double().reshape(z.shape)
    for direction in (normal(generator, *z.shape), busiest, hits.reshape(z.shape)):
        moved = F.max_pool2d(z + step(direction, radius), 3, 2, 1) - clean
        assert bool((moved.flatten(1).norm(dim=1) <= bound).all())
    assert torch.allclose(max_pool_rule(z, radius, 2), radius)


def test_margins_that_no_change_can_overturn() -> None:
    logits, radius = torch.tensor([[1.0, 3.0, 0.0], [1.0, 3.0, 0.0]]), torch.tensor([1.41, 1.42])
    assert cannot_flip(logits, radius).tolist() == [True, False]
    worst = logits[1] + torch.tensor([1.0, -1.0, 0.0]) * 1.42 / math.sqrt(2)
    assert int(worst.argmax()) == 0
