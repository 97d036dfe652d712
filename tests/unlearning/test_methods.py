from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.unlearning.batchnorm import Norm, settle_norm
from modhifi.unlearning.closed_forms import directions
from modhifi.unlearning.methods import METHODS
from modhifi.unlearning.methods.contrastive import contrastive
from modhifi.unlearning.methods.erase import erase
from modhifi.unlearning.methods.gls import gls
from modhifi.unlearning.methods.head_mask import head_mask
from modhifi.unlearning.methods.hifi_negate import hifi_negate
from modhifi.unlearning.methods.hifi_zero import hifi_zero
from modhifi.unlearning.methods.projection import projection
from modhifi.unlearning.reader_edits import Reader, ReaderMethod

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


def raw_world(centred: bool) -> tuple[Reader, list[Tensor], Tensor]:
    """A reader of three components of two columns, its two forgotten classes' rows, of which one has few, and the rest.

    ``strength`` and ``damping`` are none that a method has by default.
    """
    rows = samples(5, dim=6)
    forgotten, retained = [rows[0], rows[1][:100]], torch.cat(rows[2:])
    (mean, gram), gone = moments(retained), [moments(r) for r in forgotten]
    weight = random_weight(5, dim=6)
    means, grams = torch.stack([m for m, _ in gone]), torch.stack([g for _, g in gone])
    counts = tuple(float(len(r)) for r in (retained, *forgotten))
    components = torch.arange(6).view(-1, 2)
    return Reader(weight, mean, gram, means, grams, counts, components, centred, 0.3, 1e-2), forgotten, retained


def expected_fidelity(reader: Reader, mean: Tensor, gram: Tensor) -> Tensor:
    """``(E y_i y)² / (E y_i² · E y²)`` of the parts ``y_i`` that components make of every output."""
    energy = gram - torch.outer(mean, mean) if reader.centred else gram
    n, size = reader.components.shape
    blocks = reader.weight.view(-1, n, size)
    parts = torch.einsum("oim,imjn,ojn->oij", blocks, energy.view(n, size, n, size), blocks)
    return parts.sum(2).square() / parts.diagonal(dim1=1, dim2=2) / parts.sum((1, 2))[:, None]


def expected_masked(reader: Reader, scores: Tensor, factor: float) -> Tensor:
    """The three tenths of the weights with the highest scores times a factor: 4 or 5 of 15 pieces."""
    chosen = torch.zeros(scores.numel())
    chosen[scores.flatten().argsort(descending=True)[: round(0.3 * scores.numel())]] = 1
    chosen = (chosen * (scores.flatten() > 0)).view_as(scores).repeat_interleave(2, 1).double()
    return reader.weight * (1 + (factor - 1) * chosen)


Expected = Callable[[Reader, tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]], Tensor]
# From the moments of the forgotten classes, each with the same weight, of the retained samples, and of all.
EXPECTED: dict[str, Expected] = {
    "gls": lambda reader, forget, retain, every: (
        gls(
            reader.weight,
            *forget[::-1],
            *retain[::-1],
            strength=0.3,
            centred=reader.centred,
            damping=1e-2,
        ).weight
    ),
    "projection": lambda reader, forget, retain, every: (
        projection(reader.weight, forget[1], retain[1], forget_scale=0.3, retain_scale=3.0).weight
    ),
    "erase": lambda reader, forget, retain, every: (
        0.7 * reader.weight
        + 0.3
        * erase(
            reader.weight, *every[::-1], reader.forget_means, retain[0], centred=reader.centred, damping=1e-2
        ).weight
    ),
    "hifi-zero": lambda reader, forget, retain, every: expected_masked(reader, expected_fidelity(reader, *forget), 0.0),
    "hifi-negate": lambda reader, forget, retain, every: expected_masked(
        reader, expected_fidelity(reader, *forget), -1.0
    ),
    "contrastive": lambda reader, forget, retain, every: expected_masked(
        reader, expected_fidelity(reader, *forget) - expected_fidelity(reader, *retain), 0.0
    ),
}
READER_METHODS = {name: method for name, method in METHODS.items() if isinstance(method, ReaderMethod)}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", READER_METHODS)
def test_a_method_works_on_the_moments_of_the_raw_rows(name: str, centred: bool) -> None:
    reader, forgotten, retained = raw_world(centred)
    of_each = [moments(rows) for rows in forgotten]
    forget = (sum(m for m, _ in of_each) / 2, sum(g for _, g in of_each) / 2)
    edit = READER_METHODS[name].edit(reader)
    expected = EXPECTED[name](reader, forget, moments(retained), moments(torch.cat([*forgotten, retained])))
    torch.testing.assert_close(edit.weight, expected)
    assert not torch.allclose(edit.weight, reader.weight)
    if edit.shift is not None:  # the output at the retain mean stays where it was
        kept = reader.weight @ reader.retain_mean
        torch.testing.assert_close(edit.weight @ reader.retain_mean + edit.shift, kept)


@pytest.mark.parametrize("name", ["gls", "projection", "erase"])
def test_moments_in_single_precision_are_solved_in_double(name: str) -> None:
    reader, _, _ = raw_world(True)
    tensors = {
        f.name: v for f in fields(reader) if torch.is_tensor(v := getattr(reader, f.name)) and v.is_floating_point()
    }
    single = replace(reader, **{name: value.float() for name, value in tensors.items()})
    double = replace(reader, **{name: value.float().double() for name, value in tensors.items()})
    low, high = READER_METHODS[name].edit(single), READER_METHODS[name].edit(double)
    torch.testing.assert_close(low.weight, high.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [(1.0, 1.0), (1e-15, 1e3), (0.5, 1e-4)])
def test_directions_span_the_rows_whatever_their_lengths(lengths: tuple[float, float]) -> None:
    first, second = random_weight(0, 2)
    # A combination of both, and a row that names no direction.
    rows = torch.stack([lengths[0] * first, torch.zeros(DIM), lengths[1] * second, first - 2 * second])
    basis = directions(rows)
    assert basis.shape == (DIM, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64))
    plane = torch.linalg.qr(torch.stack([first, second], 1)).Q
    torch.testing.assert_close(basis @ basis.T, plane @ plane.T)
    assert directions(torch.zeros(2, DIM)).shape == (DIM, 0)


@given(seeds, st.floats(0.01, 10), st.booleans(), st.sampled_from([1.0, 1e-3]))
@settings(max_examples=12, deadline=None)
def test_gls_is_the_least_squares_solution_on_raw_samples(
    seed: int, strength: float, centred: bool, size: float
) -> None:
    rows = [size * r for r in samples(seed, per_class=60)]
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


@pytest.mark.parametrize("centred", [False, True])
def test_gls_changes_nothing_where_the_forgotten_samples_are_all_alike(centred: bool) -> None:
    """Their second moment about the origin is zero: there is no unit for the strength."""
    mean_r, gram_r = moments(torch.cat(samples(4)))
    mean_f = mean_r if centred else torch.zeros_like(mean_r)
    edit = gls(random_weight(4), torch.outer(mean_f, mean_f), mean_f, gram_r, mean_r, strength=2.0, centred=centred)
    torch.testing.assert_close(edit.weight, random_weight(4))


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
