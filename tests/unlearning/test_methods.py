from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.unlearning.batchnorm import Norm, settle_norm
from modhifi.unlearning.methods.contrastive import contrastive
from modhifi.unlearning.methods.erase import erase
from modhifi.unlearning.methods.gls import gls
from modhifi.unlearning.methods.head_mask import head_mask
from modhifi.unlearning.methods.hifi_negate import hifi_negate
from modhifi.unlearning.methods.hifi_zero import hifi_zero
from modhifi.unlearning.methods.projection import projection

CLASSES, DIM, OUT = 4, 7, 5
seeds = st.integers(0, 10_000)


def samples(seed: int, per_class: int = 300, dim: int = DIM) -> list[Tensor]:
    """Correlated Gaussian classes with different means, each ``(per_class, dim)``; the first are forgotten."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) + torch.eye(dim, dtype=torch.float64)
    means = 2 * torch.randn(CLASSES, dim, generator=generator, dtype=torch.float64) + 1
    return [torch.randn(per_class, dim, generator=generator, dtype=torch.float64) @ mix + mean for mean in means]


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), rows.T @ rows / len(rows)


def random_weight(seed: int, out: int = OUT, dim: int = DIM) -> Tensor:
    return torch.randn(out, dim, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


@given(seeds, st.floats(0.01, 10), st.booleans())
@settings(max_examples=12, deadline=None)
def test_gls_is_the_least_squares_solution_on_raw_samples(seed: int, strength: float, centred: bool) -> None:
    rows = samples(seed, per_class=60)
    forget, retain, weight = rows[0], torch.cat(rows[1:]), random_weight(seed)
    (mean_f, gram_f), (mean_r, gram_r) = moments(forget), moments(retain)
    edit = gls(weight, gram_f, mean_f, gram_r, mean_r, strength=strength, centred=centred, damping=1e-3)
    origin = mean_r if centred else torch.zeros(DIM, dtype=torch.float64)
    x_r, x_f = retain - origin, forget - origin
    energy_r, energy_f = x_r.square().sum() / len(x_r), x_f.square().sum() / len(x_f)
    ridge = (1e-3 * energy_r / DIM).sqrt() * torch.eye(DIM, dtype=torch.float64)
    keep = x_r / len(x_r) ** 0.5
    pull = x_f * (strength * energy_r / energy_f / len(x_f)).sqrt()
    goal = torch.zeros(len(x_f), OUT, dtype=torch.float64)
    if not centred:
        goal = (weight @ mean_r).expand(len(x_f), -1) * (strength * energy_r / energy_f / len(x_f)).sqrt()
    brute = torch.linalg.lstsq(
        torch.cat([keep, ridge, pull]), torch.cat([keep @ weight.T, ridge @ weight.T, goal])
    ).solution.T
    torch.testing.assert_close(edit.weight, brute, atol=1e-7, rtol=1e-6)
    assert (edit.shift is not None) == centred
    if edit.shift is not None:
        torch.testing.assert_close(edit.weight @ mean_r + edit.shift, weight @ mean_r)


def test_gls_of_strength_zero_changes_nothing_and_more_strength_forgets_more() -> None:
    rows = samples(4)
    (mean_f, gram_f), (mean_r, gram_r) = moments(rows[0]), moments(torch.cat(rows[1:]))
    weight = random_weight(4)
    gaps = []
    for strength in (0.0, 0.3, 3.0, 30.0):
        edit = gls(weight, gram_f, mean_f, gram_r, mean_r, strength=strength)
        gaps.append(float((edit.weight @ (mean_f - mean_r)).norm()))
    torch.testing.assert_close(gls(weight, gram_f, mean_f, gram_r, mean_r, strength=0.0).weight, weight)
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < gaps[0] / 5


def test_hifi_methods_touch_the_share_of_weights_with_the_highest_scores() -> None:
    weight = torch.arange(1.0, 13).view(2, 6)
    blocks = torch.tensor([[0, 3], [1, 4], [2, 5]])
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    zero = hifi_zero(weight, scores, blocks, 1 / 3)
    assert zero.weight.tolist() == [[0, 2, 3, 0, 5, 6], [7, 0, 9, 10, 0, 12]]
    assert zero.shift is None
    negated = hifi_negate(weight, scores, blocks, 1 / 3)
    assert negated.weight.tolist() == [[-1, 2, 3, -4, 5, 6], [7, -8, 9, 10, -11, 12]]
    # A contribution without energy is not chosen, whatever the share.
    assert hifi_zero(weight, scores, blocks, 1.0).weight.tolist() == [[0, 0, 3, 0, 0, 6], [0, 0, 9, 0, 0, 12]]
    retain = torch.tensor([[0.9, 0.0, 0.0], [0.1, 0.9, 0.0]])
    picked = contrastive(weight, scores, retain, blocks, 1 / 3)
    assert picked.weight.tolist() == [[1, 0, 3, 4, 0, 6], [0, 8, 9, 0, 11, 12]]
    mean = torch.ones(6)
    moved = hifi_zero(weight, scores, blocks, 1 / 3, mean=mean)
    assert moved.shift is not None
    torch.testing.assert_close(moved.weight @ mean.double() + moved.shift, weight.double() @ mean.double())
    with pytest.raises(ModhifiError, match="share"):
        hifi_zero(weight, scores, blocks, 5)


def test_projection_follows_the_spaces() -> None:
    weight = random_weight(0, OUT, 4)
    empty, first, second = torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 0, 0, 0])), torch.eye(4)
    second[0, 0] = 0
    torch.testing.assert_close(projection(weight, empty, first, forget_scale=9, retain_scale=9).weight, weight)
    # Disjoint spaces: the forget axis goes. The same space: it stays.
    gone = projection(weight, first, second, forget_scale=9, retain_scale=9)
    expected = weight.clone()
    expected[:, 0] = 0
    torch.testing.assert_close(gone.weight, expected)
    torch.testing.assert_close(projection(weight, first, first, forget_scale=9, retain_scale=9).weight, weight)
    # One axis of three equal ones: s = 1/3, so a s / ((a - 1) s + 1) = 3 / (8 / 3 + 1) = 9 / 11.
    partly = projection(weight, second, empty, forget_scale=9, retain_scale=9)
    torch.testing.assert_close(partly.weight[:, 1], weight[:, 1] * 2 / 11)
    with pytest.raises(ModhifiError, match="scale"):
        projection(weight, first, second, forget_scale=0, retain_scale=9)


@given(seeds, st.booleans())
@settings(max_examples=10, deadline=None)
def test_head_mask_never_answers_a_closed_class_and_keeps_the_others(seed: int, biased: bool) -> None:
    weight = random_weight(seed)
    bias = random_weight(seed, OUT, 1)[:, 0] if biased else None
    edit = head_mask(weight, bias, [1, 3])
    x = torch.cat(samples(seed))
    before = x @ weight.T + (0 if bias is None else bias)
    after = x @ edit.weight.T + (0 if bias is None or edit.shift is None else bias + edit.shift)
    open_ = [0, 2, 4]
    torch.testing.assert_close(after[:, open_], before[:, open_])
    assert not set(after.argmax(1).tolist()) & {1, 3}


def test_head_mask_refuses_impossible_classes() -> None:
    with pytest.raises(ModhifiError, match="does not exist"):
        head_mask(random_weight(0), None, [OUT])
    with pytest.raises(ModhifiError, match="every class"):
        head_mask(random_weight(0), None, range(OUT))


def test_blend_is_linear_between_nothing_and_the_edit() -> None:
    rows = samples(2)
    mean, gram = moments(torch.cat(rows))
    weight = random_weight(2)
    edit = erase(weight, gram, mean, rows[0].mean(0)[None], torch.cat(rows[1:]).mean(0))
    assert edit.shift is not None
    none, half, full = (edit.blend(weight, t) for t in (0.0, 0.5, 1.0))
    torch.testing.assert_close(none.weight, weight)
    torch.testing.assert_close(full.weight, edit.weight)
    torch.testing.assert_close(half.weight, (weight + edit.weight) / 2)
    torch.testing.assert_close(half.shift, edit.shift / 2)


def test_settle_norm_keeps_the_function_and_survives_a_re_estimation() -> None:
    norm = torch.nn.BatchNorm1d(DIM, momentum=None).double()
    x = torch.cat(samples(0))
    for seed, vector in enumerate((norm.weight, norm.bias, norm.running_mean)):
        assert vector is not None
        vector.data.copy_(random_weight(seed, DIM, 1)[:, 0])
    assert norm.running_mean is not None and norm.running_var is not None
    before = norm.eval()(x).detach()
    old = Norm(norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var)
    new = settle_norm(old, x.mean(0), x.var(0), norm.eps)
    norm.weight.data, norm.bias.data = new.gamma, new.beta
    norm.running_mean, norm.running_var = new.mean.clone(), new.variance.clone()
    torch.testing.assert_close(norm(x).detach(), before)
    norm.reset_running_stats()
    norm.train()(x)
    torch.testing.assert_close(norm.eval()(x).detach(), before)
