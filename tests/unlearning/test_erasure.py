from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modhifi.calibration.moments import Moments
from modhifi.errors import ModhifiError
from modhifi.unlearning.closed_forms import pooled
from modhifi.unlearning.methods import METHODS
from modhifi.unlearning.methods.erase import erase, erasing_projection
from modhifi.unlearning.methods.erase_writers import erase_writers, stress_classes
from modhifi.unlearning.moments import Joint
from modhifi.unlearning.settings import UnlearnSettings
from modhifi.unlearning.wide import spanned
from modhifi.unlearning.writer_edits import WriterOfStream

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


def least_squares_recall(rows: list[Tensor], target: int) -> float:
    """Share of class ``target`` that a least-squares one-hot classifier with intercept, fitted on these rows, finds."""
    x = torch.cat(rows)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    labels = torch.cat([torch.full((len(r),), c) for c, r in enumerate(rows)])
    readout = torch.linalg.lstsq(x, torch.nn.functional.one_hot(labels).double(), driver="gelsd").solution
    found = (x @ readout)[labels == target].argmax(1) == target
    return float(found.double().mean())


@given(seeds, st.integers(1, 3), st.booleans())
@settings(max_examples=10, deadline=None)
def test_erasing_projection_is_idempotent_and_keeps_what_it_names(seed: int, forget: int, centred: bool) -> None:
    rows = samples(seed)
    mean, gram = moments(torch.cat(rows))
    retain = torch.cat(rows[forget:]).mean(0)
    gone = torch.stack([r.mean(0) for r in rows[:forget]])
    projection, _ = erasing_projection(gram, mean, gone, retain, centred=centred)
    torch.testing.assert_close(projection @ projection, projection, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close((gone - retain) @ projection.T, gone - retain, atol=1e-7, rtol=1e-6)
    assert round(float(projection.trace())) == forget
    if not centred:
        torch.testing.assert_close(projection @ retain, torch.zeros(DIM, dtype=torch.float64), atol=1e-7, rtol=0)


@given(seeds, st.booleans())
@settings(max_examples=10, deadline=None)
def test_no_oblique_projection_changes_less(seed: int, centred: bool) -> None:
    rows = samples(seed)
    pooled = torch.cat(rows)
    mean, gram = moments(pooled)
    gone, retain = rows[0].mean(0)[None], torch.cat(rows[1:]).mean(0)
    best, _ = erasing_projection(gram, mean, gone, retain, centred=centred, damping=1e-12)
    direction = (gone[0] - retain)[:, None]
    generator = torch.Generator().manual_seed(seed)
    for size in (1.0, 0.1, 0.01):
        # Any other projection onto the direction differs by a reader that does not see it (nor the retain mean).
        blind = torch.randn(DIM, 1, generator=generator, dtype=torch.float64) * size
        held = direction if centred else torch.stack([direction[:, 0], retain], 1)
        blind = blind - held @ torch.linalg.lstsq(held, blind).solution
        other = best + direction @ blind.T
        x = pooled - mean if centred else pooled
        assert float((x @ other.T).square().sum()) >= float((x @ best.T).square().sum()) * (1 - 1e-9)


@pytest.mark.parametrize("centred", [False, True])
def test_the_erasing_projection_is_that_of_the_inverse_moments(centred: bool) -> None:
    """``P = D (H^T S^-1 H)^-1 H^T S^-1`` with the retain mean beside D in H where nothing takes it."""
    rows = samples(9)
    mean, gram = moments(torch.cat(rows))
    gone, retain = rows[0].mean(0), torch.cat(rows[1:]).mean(0)
    found, _ = erasing_projection(gram, mean, gone[None], retain, centred=centred, damping=1e-13)
    inverse = torch.linalg.inv(gram - torch.outer(mean, mean) if centred else gram)
    held = torch.stack([gone - retain] if centred else [gone - retain, retain], 1)
    reader = (inverse @ held @ torch.linalg.inv(held.T @ inverse @ held))[:, 0]
    torch.testing.assert_close(found, torch.outer(gone - retain, reader), atol=1e-7, rtol=1e-6)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_projection_does_not_depend_on_the_mixture(seed: int) -> None:
    rows = samples(seed)
    stats = [moments(rows[0]), moments(torch.cat(rows[1:]))]
    means, grams = torch.stack([s[0] for s in stats]), torch.stack([s[1] for s in stats])
    within = sum(g - torch.outer(m, m) for m, g in stats)
    mean, gram = pooled(means, grams, [1, 1])
    mixed, _ = erasing_projection(gram, mean, means[:1], means[1], damping=1e-13)
    direct, _ = erasing_projection(within, torch.zeros(DIM), means[:1], means[1], damping=1e-13)
    torch.testing.assert_close(mixed, direct, atol=1e-6, rtol=1e-5)


@given(seeds, st.integers(1, 2))
@settings(max_examples=10, deadline=None)
def test_erase_leaves_no_linear_readout(seed: int, forget: int) -> None:
    rows = samples(seed)
    mean, gram = moments(torch.cat(rows))
    retain = torch.cat(rows[forget:]).mean(0)
    gone = torch.stack([r.mean(0) for r in rows[:forget]])
    weight = random_weight(seed, DIM)
    edit = erase(weight, gram, mean, gone, retain)
    assert edit.shift is not None
    after = [r @ edit.weight.T + edit.shift for r in rows]
    for target in range(forget):
        torch.testing.assert_close(after[target].mean(0), weight @ retain, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(torch.cat(after[forget:]).mean(0), weight @ retain, atol=1e-7, rtol=1e-7)
    # Least squares can do no better for a forgotten class than the constant readout, its share of the samples.
    both = [after[0], torch.cat(after[1:])]
    assert least_squares_recall(both, 0) == 0.0


def test_erased_class_falls_to_chance_for_a_balanced_classifier() -> None:
    rows = samples(3)
    balanced = [rows[0], torch.cat(rows[1:])[:: CLASSES - 1]]
    mean, gram = moments(torch.cat(balanced))
    edit = erase(torch.eye(DIM), gram, mean, balanced[0].mean(0)[None], balanced[1].mean(0))
    x = torch.cat(balanced)
    y = torch.cat([torch.ones(len(balanced[0])), -torch.ones(len(balanced[1]))]).double()

    def correlation(inputs: Tensor) -> float:
        inputs = inputs - inputs.mean(0)
        fitted = inputs @ torch.linalg.lstsq(inputs, (y - y.mean())[:, None], driver="gelsd").solution
        return float(fitted.square().sum() / (y - y.mean()).square().sum())

    assert correlation(x) > 0.5
    assert correlation(x @ edit.weight.T) < 1e-9


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_erase_without_a_place_for_the_mean_keeps_the_retain_mean(seed: int) -> None:
    rows = samples(seed)
    mean, gram = moments(torch.cat(rows))
    retain = torch.cat(rows[1:]).mean(0)
    weight = random_weight(seed)
    edit = erase(weight, gram, mean, rows[0].mean(0)[None], retain, centred=False)
    assert edit.shift is None
    torch.testing.assert_close(edit.weight @ retain, weight @ retain, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(edit.weight @ rows[0].mean(0), weight @ retain, atol=1e-7, rtol=1e-7)


def test_erase_changes_nothing_where_the_classes_agree() -> None:
    rows = samples(0)
    mean, gram = moments(torch.cat(rows))
    edit = erase(random_weight(0), gram, mean, mean[None], mean)
    torch.testing.assert_close(edit.weight, random_weight(0))


def test_erase_takes_collinear_directions_once() -> None:
    rows = samples(1)
    mean, gram = moments(torch.cat(rows))
    retain, gone = torch.cat(rows[1:]).mean(0), rows[0].mean(0)
    once = erase(random_weight(1), gram, mean, gone[None], retain)
    twice = erase(random_weight(1), gram, mean, torch.stack([gone, 3 * gone - 2 * retain]), retain)
    torch.testing.assert_close(once.weight, twice.weight, atol=1e-7, rtol=1e-6)


def test_erase_refuses_to_erase_the_mean_without_a_place_for_it() -> None:
    rows = samples(1)
    mean, gram = moments(torch.cat(rows))
    with pytest.raises(ModhifiError, match="bias"):
        erase(random_weight(1), gram, mean, 2 * mean[None], mean, centred=False)


def test_damping_rises_in_recorded_steps() -> None:
    gram = torch.diag(torch.tensor([1.0, 1.0, -0.005])).double()
    zero, gone, retain = torch.zeros(3), torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([0.0, 1.0, 0.0])
    edit = erase(torch.eye(3), gram, zero, gone, retain)
    assert edit.damping == pytest.approx(1e-2)
    assert erase(torch.eye(3), gram.abs(), zero, gone, retain).damping == 1e-4
    with pytest.raises(ModhifiError, match="damping"):
        erase(torch.eye(3), gram * float("nan"), zero, gone, retain)


def writer_world(seed: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Inputs, skips, a writer ``(OUT, DIM)`` and its scale: the stream is ``scale * (W x) + skip``."""
    generator = torch.Generator().manual_seed(seed + 7)
    inputs = samples(seed)
    lift = torch.randn(OUT, DIM, generator=generator, dtype=torch.float64) / 2
    skips = [r @ lift.T + 0.3 * torch.randn(len(r), OUT, generator=generator, dtype=torch.float64) for r in inputs]
    scale = torch.rand(OUT, generator=generator, dtype=torch.float64) + 0.5
    return inputs, skips, random_weight(seed), scale


def joint_moments(inputs: list[Tensor], stream: list[Tensor], forget: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    joint = [torch.cat(pair, 1) for pair in zip(inputs, stream, strict=True)]
    gone = [moments(j) for j in joint[:forget]]
    retain_mean, retain_gram = moments(torch.cat(joint[forget:]))
    return torch.stack([g[0] for g in gone]), torch.stack([g[1] for g in gone]), retain_mean, retain_gram


@given(seeds, st.integers(1, 2), st.booleans())
@settings(max_examples=10, deadline=None)
def test_erase_writers_exact_closes_every_class_gap_of_the_stream(seed: int, forget: int, centred: bool) -> None:
    inputs, skips, weight, scale = writer_world(seed)
    stream = [scale * (x @ weight.T) + s for x, s in zip(inputs, skips, strict=True)]
    edit = erase_writers(
        weight, *joint_moments(inputs, stream, forget), scale=scale, exact=True, centred=centred, damping=1e-9
    )
    shift = torch.zeros(OUT) if edit.shift is None else edit.shift
    assert (edit.shift is not None) == centred
    after = [scale * (x @ edit.weight.T + shift) + s for x, s in zip(inputs, skips, strict=True)]
    retain_before, retain_after = torch.cat(stream[forget:]).mean(0), torch.cat(after[forget:]).mean(0)
    torch.testing.assert_close(retain_after, retain_before, atol=1e-7, rtol=1e-7)
    for target in range(forget):
        torch.testing.assert_close(after[target].mean(0), retain_after, atol=1e-5, rtol=1e-5)
    assert least_squares_recall([after[0], torch.cat(after[forget:])], 0) == 0.0
    assert int(torch.linalg.matrix_rank(edit.weight - weight, rtol=1e-9)) == forget


@given(seeds, st.booleans())
@settings(max_examples=10, deadline=None)
def test_erase_writers_regresses_the_score_on_the_input(seed: int, centred: bool) -> None:
    inputs, skips, weight, scale = writer_world(seed)
    stream = [scale * (x @ weight.T) + s for x, s in zip(inputs, skips, strict=True)]
    edit = erase_writers(
        weight,
        *joint_moments(inputs, stream, 1),
        scale=scale,
        forget_weight=1 / CLASSES,
        centred=centred,
        damping=1e-12,
    )
    # The same by brute force on raw rows: LEACE's score of the stream, then lstsq on the inputs.
    x, s = torch.cat(inputs), torch.cat(stream)
    mean_x, mean_s = torch.cat(inputs[1:]).mean(0), torch.cat(stream[1:]).mean(0)
    gap = stream[0].mean(0) - mean_s
    reader = torch.linalg.solve(torch.cov(s.T, correction=0), gap)
    score = (s - mean_s) @ reader / (gap @ reader)
    rows = x - mean_x
    basis = torch.eye(DIM, dtype=torch.float64)
    if not centred:
        basis = torch.linalg.svd(mean_x[None]).Vh[1:].T
    predict = basis @ torch.linalg.lstsq(rows @ basis, score[:, None]).solution[:, 0]
    torch.testing.assert_close(edit.weight, weight - torch.outer(gap / scale, predict), atol=1e-6, rtol=1e-5)
    if edit.shift is not None:
        torch.testing.assert_close(edit.shift, (weight - edit.weight) @ mean_x, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dead", [[2], list(range(OUT))])
def test_erase_writers_leaves_channels_without_scale_alone(dead: list[int]) -> None:
    inputs, skips, weight, scale = writer_world(5)
    scale[dead] = 0.0
    stream = [scale * (x @ weight.T) + s for x, s in zip(inputs, skips, strict=True)]
    edit = erase_writers(weight, *joint_moments(inputs, stream, 1), scale=scale)
    torch.testing.assert_close(edit.weight[dead], weight[dead])
    assert edit.shift is not None and not edit.shift[dead].any()
    assert (float((edit.weight - weight).norm()) > 0) == (len(dead) < OUT)


@pytest.mark.parametrize("gap", [1.0, -1.0])
def test_erase_writers_exact_refuses_inputs_that_do_not_carry_the_class(gap: float) -> None:
    inputs, _, weight, _ = writer_world(7)
    same = [r - r.mean(0) for r in inputs]
    stream = [x @ weight.T + gap * (c == 0) for c, x in enumerate(same)]
    with pytest.raises(ModhifiError, match="leave the writer out"):
        erase_writers(weight, *joint_moments(same, stream, 1), exact=True)


@given(seeds, st.integers(1, 2), st.sampled_from([30, 400]))
@settings(max_examples=10, deadline=None)
def test_a_writer_of_many_columns_is_edited_as_by_its_gram(seed: int, forget: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count, damping = 120, 1e-5
    group = torch.arange(count) % (forget + 2)
    group = torch.where(group > forget, 0, group)
    hidden = torch.randn(count, 20, generator=generator, dtype=torch.float64) + 0.5 * group[:, None]
    x = hidden @ torch.randn(20, columns, generator=generator, dtype=torch.float64)
    x += 0.3 * torch.randn(count, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(OUT, columns, generator=generator, dtype=torch.float64)
    stream = x @ weight.T

    order = [x[group == j + 1] for j in range(forget)] + [x[group == 0]]
    streams = [stream[group == j + 1] for j in range(forget)] + [stream[group == 0]]
    direct = erase_writers(weight, *joint_moments(order, streams, forget), exact=True, damping=damping)

    wide = spanned(x.float(), stream.float(), group, group)
    retain, *gone = wide.joint.moments
    means, grams = torch.stack([m.mean[0] for m in gone]), torch.stack([m.gram[0] for m in gone])
    reduced = erase_writers(
        torch.zeros(OUT, count), means, grams, retain.mean[0], retain.gram[0], exact=True, damping=damping
    )
    change, expected = wide.lift(reduced.weight), direct.weight - weight
    assert float((change @ x.T - expected @ x.T).norm() / (expected @ x.T).norm()) < 1e-2
    assert reduced.shift is not None
    torch.testing.assert_close(reduced.shift, -change @ order[-1].mean(0), rtol=1e-3, atol=1e-3)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_stressed_classes_are_kept_where_they_are(seed: int) -> None:
    inputs, _, weight, _ = writer_world(seed)
    stream = [x @ weight.T for x in inputs]
    mean_f, gram_f, mean_r, gram_r = joint_moments(inputs, stream, 1)
    rows = [torch.cat(pair, 1) for pair in zip(inputs[1:], stream[1:], strict=True)]
    means = torch.stack([r.mean(0) for r in rows])
    shares = torch.tensor([len(r) for r in rows]) / sum(len(r) for r in rows)

    def moved(stress: float) -> float:
        gram = stress_classes(gram_r, mean_r, means, shares, stress)
        edit = erase_writers(weight, mean_f, gram_f, mean_r, gram, exact=True, damping=1e-9)
        assert edit.shift is not None
        after = [x.mean(0) @ edit.weight.T + edit.shift for x in inputs]
        torch.testing.assert_close(after[0], mean_r[DIM:], atol=1e-5, rtol=1e-5)
        return max(float((a - s.mean(0)).norm()) for a, s in zip(after[1:], stream[1:], strict=True))

    assert moved(1e4) < 0.2 * moved(0.0)
    assert torch.equal(stress_classes(gram_r, mean_r, means, shares, 0.0), gram_r.double())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_writers_edit_works_on_the_moments_of_the_raw_rows(exact: bool, scaled: bool) -> None:
    inputs, skips, weight, scale = writer_world(4)
    inputs[3], skips[3] = inputs[3][:50], skips[3][:50]  # retained classes of unequal shares
    rows = [torch.cat([x, scale * (x @ weight.T) + s], 1) for x, s in zip(inputs, skips, strict=True)]
    gone, kept = rows[:2], rows[2:]
    retained = torch.cat(kept)
    joint = Joint(
        [Moments(len(r), r.mean(0)[None], torch.cov(r.T, correction=0)[None]) for r in (retained, *gone)],
        torch.stack([r.mean(0) for r in kept]),
        torch.tensor([len(r) / len(retained) for r in kept]),
    )
    settings = UnlearnSettings(exact=exact, forget_weight=0.3, class_weight=2.0, damping=1e-2)
    found = METHODS["erase-writers"].edit(WriterOfStream(weight, joint, scale if scaled else None, False, settings))
    # The spread of the class means counts three times: once in the samples, twice more as samples of their own.
    mean, gram = moments(retained)
    means = torch.cat([r.mean(0).expand(len(r), -1) for r in kept]) - mean
    expected = erase_writers(
        weight,
        torch.stack([r.mean(0) for r in gone]),
        torch.stack([moments(r)[1] for r in gone]),
        mean,
        gram + 2 * means.T @ means / len(retained),
        scale=scale if scaled else None,
        forget_weight=0.3,
        exact=exact,
        centred=False,
        damping=1e-2,
    )
    torch.testing.assert_close(found.weight, expected.weight)
    assert found.shift is None and found.damping == 1e-2


def test_a_writers_moments_in_single_precision_are_solved_in_double() -> None:
    inputs, skips, weight, scale = writer_world(4)
    stream = [scale * (x @ weight.T) + s for x, s in zip(inputs, skips, strict=True)]
    single = [t.float() for t in (weight, *joint_moments(inputs, stream, 2))]
    low = erase_writers(*single, scale=scale.float(), exact=True)
    high = erase_writers(*(t.double() for t in single), scale=scale.float().double(), exact=True)
    torch.testing.assert_close(low.weight, high.weight, rtol=1e-9, atol=1e-9)
