"""The attacks, on features whose content is known, and the words made of their figures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modhifi.unlearning import attacks
from modhifi.unlearning.audit_text import conclude


def clusters(seed: int, n: int = 60, classes: int = 3, d: int = 6, gap: float = 6.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(n) + 4
    centres = gap * torch.eye(classes, d)
    return centres[labels - 4] + torch.randn(len(labels), d, generator=generator), labels


ATTACKS = [attacks.linear_probe, attacks.nearest_mean, attacks.nearest_neighbours]


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_reads_what_is_there(attack) -> None:
    fit, labels = clusters(0)
    test, truth = clusters(1)
    assert (attack(fit, labels, test) == truth).double().mean() > 0.97


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_cannot_read_what_is_not(attack) -> None:
    fit, labels = clusters(0, n=200, gap=0.0)
    test, truth = clusters(1, n=200, gap=0.0)
    assert (attack(fit, labels, test) == truth).double().mean() < 0.45


@pytest.mark.parametrize("attack", ATTACKS)
def test_scale_and_dead_features_do_not_matter(attack) -> None:
    fit, labels = clusters(0, gap=2.0)
    test, _ = clusters(1, gap=2.0)
    scale = torch.tensor([1.0, 1e3, 1e-3, 1.0, 5.0, 1.0])
    dead = torch.full((len(fit), 1), 7.0)
    expected = attack(fit, labels, test)
    found = attack(torch.cat([fit * scale, dead], 1), labels, torch.cat([test * scale, dead], 1))
    assert torch.equal(found, expected)


def test_the_probe_is_ridge_regression() -> None:
    fit, labels = clusters(0, gap=1.0)
    test, _ = clusters(1, gap=1.0)
    a, b = attacks.standardise(fit, test)
    ones = torch.ones(len(a), 1, dtype=torch.float64)
    design = torch.cat([a, ones, 0 * a[:, :0]], 1)
    targets = torch.stack([(labels == c).double() for c in (4, 5, 6)], 1)
    # The same problem as least squares on augmented rows.
    width = design.shape[1]
    rows = torch.cat([design, (attacks.RIDGE * len(a)) ** 0.5 * torch.eye(width, dtype=torch.float64)])
    weights = torch.linalg.lstsq(rows, torch.cat([targets, torch.zeros(width, 3, dtype=torch.float64)])).solution
    expected = 4 + (torch.cat([b, torch.ones(len(b), 1, dtype=torch.float64)], 1) @ weights).argmax(1)
    assert torch.equal(attacks.linear_probe(fit, labels, test), expected)


def test_relearning_sees_no_more_than_its_shots() -> None:
    fit, labels = clusters(0)
    test, truth = clusters(1)
    later = torch.nonzero(labels == 5).flatten()[10:]
    poisoned = fit.clone()
    poisoned[later] = 1e3
    expected = attacks.relearn(fit, labels, test, [5])
    assert torch.equal(attacks.relearn(poisoned, labels, test, [5]), expected)
    assert (expected == truth)[truth == 5].double().mean() > 0.9


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_auc_counts_pairs(members: list[int], others: list[int]) -> None:
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert attacks.auc(torch.tensor(members), torch.tensor(others)) == pytest.approx(sum(pairs) / len(pairs))


def row(**values: float) -> dict[str, float | None]:
    return {"forget": 0.9, "retain": 0.9, "recall": 0.9, "probe": 0.9, "neighbours": 0.9, "recall_plain": None} | values


@pytest.mark.parametrize(
    ("edited", "reference", "verdict"),
    [
        (row(), None, "NOT FORGOTTEN"),
        (row(forget=0.0, recall=0.0), None, "SUPPRESSED"),
        (row(forget=0.0, recall=0.5, probe=0.1), None, "PARTLY ERASED"),
        (row(forget=0.0, recall=0.0, probe=0.5), None, "PARTLY ERASED"),
        (row(forget=0.0, recall=0.0, probe=0.2), None, "ERASED FOR A LINEAR READER"),
        (row(forget=0.0, recall=0.0, probe=0.5), row(probe=0.6), "ERASED FOR A LINEAR READER"),
    ],
)
def test_the_verdict_follows_the_figures(edited, reference, verdict: str) -> None:
    rows = {"original": row(), "edited": edited, "head-mask": row(forget=0.0)}
    if reference is not None:
        rows["reference"] = reference
    found, text = conclude(rows, ["cat"])
    assert found == verdict
    assert "no proof of data deletion" in text and "cat" in text
