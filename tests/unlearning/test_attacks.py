"""Every attack against brute force on a tiny network, and the closed forms on features whose content is known."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modhifi.data.labels import populations
from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.unlearning.attacks import ATTACKS, Attacked, attack, measures
from modhifi.unlearning.attacks.linear_probe import RIDGE, linear_probe
from modhifi.unlearning.attacks.membership import auc
from modhifi.unlearning.attacks.nearest_mean import nearest_mean
from modhifi.unlearning.attacks.nearest_neighbours import NEIGHBOURS, nearest_neighbours
from modhifi.unlearning.attacks.relearn import SHOTS, relearn
from modhifi.unlearning.data import UnlearnData
from modhifi.unlearning.observe import observe
from modhifi.unlearning.sites import find_sites

CLASSES, FORGOTTEN, EARLIER = 4, [2], [3]


def images(seed: int, n: int) -> Samples:
    """``n`` labelled tensors ``(3, 6, 6)`` whose mean depends on their class, in no order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n).remainder(CLASSES)[torch.randperm(n, generator=generator)]
    pixels = torch.randn(n, 3, 6, 6, generator=generator) + 0.5 * torch.eye(CLASSES, 3)[labels][:, :, None, None]
    names = tuple(f"{seed}-{i}" for i in range(n))
    return Samples(lambda i: pixels[i], names, labels, names, "test", False)


@pytest.fixture(scope="module")
def target() -> Attacked:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    train = images(4, 400)
    batch = next(train.batches(400))
    with torch.no_grad():
        model[1].momentum = 1.0
        model(batch)
        features = model.eval()[:5](batch)
        model[5].weight.copy_(torch.linalg.lstsq(features, F.one_hot(train.labels).float()).solution.T)
        model[5].bias.zero_()
    original = load_model(model, example=torch.randn(2, 3, 6, 6))
    edited, unsettled = copy.deepcopy(original.model), copy.deepcopy(original.model)
    with torch.no_grad():
        edited[0].weight += 0.1 * torch.randn(8, 3, 3, 3)
        unsettled[0].weight += 0.1 * torch.randn(8, 3, 3, 3)
    sites, edit, fit, test = find_sites(original), images(0, 40), images(1, 240), images(2, 160)
    data = UnlearnData(edit, populations(edit, FORGOTTEN, EARLIER), fit, test, ())
    return Attacked(
        original,
        edited,
        unsettled,
        observe(original, edited, sites, fit, 64),
        observe(original, edited, sites, test, 64),
        observe(original, original.model, sites, test, 64),
        original.model[5],
        data,
        FORGOTTEN,
        EARLIER,
        members=images(3, 80),
        batch_size=256,
    )


def truth(target: Attacked) -> list[int]:
    return target.data.test.labels.tolist()


def found(target: Attacked, predicted: list[int], classes: set[int]) -> float:
    """The share of the test samples of some classes that are recognised."""
    right = [p == t for p, t in zip(predicted, truth(target), strict=True) if t in classes]
    return sum(right) / len(right)


def scaled(target: Attacked) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """Standardised rows to learn from, those of classes forgotten earlier left out, with classes; rows to predict."""
    used = [i for i, c in enumerate(target.data.fit.labels.tolist()) if c not in EARLIER]
    rows, test = target.fit.features[used].double(), target.test.features.double()
    mean, spread = rows.mean(0), rows.std(0)
    return list((rows - mean) / spread), target.data.fit.labels[used].tolist(), list((test - mean) / spread)


def by_means(rows: list[Tensor], labels: list[int], test: list[Tensor]) -> list[int]:
    means = {c: torch.stack([r for r, k in zip(rows, labels, strict=True) if k == c]).mean(0) for c in set(labels)}
    return [min(means, key=lambda c: float((x - means[c]).norm())) for x in test]


def accuracy(target: Attacked) -> dict[str, float]:
    after, before = target.test.logits.argmax(1).tolist(), target.original_test.logits.argmax(1).tolist()
    losses = [found(target, before, {c}) - found(target, after, {c}) for c in (0, 1)]
    retained = found(target, after, {0, 1})
    return {"forget": found(target, after, set(FORGOTTEN)), "retain": retained, "worst_loss": max(losses)}


def kl(target: Attacked) -> dict[str, float]:
    rows = [i for i, c in enumerate(truth(target)) if c in (0, 1)]
    before, after = (seen.logits[rows][:, :2].double().log_softmax(1) for seen in (target.original_test, target.test))
    return {"kl": float(F.kl_div(after, before, log_target=True, reduction="batchmean"))}


@torch.no_grad()
def norm_recall(target: Attacked) -> dict[str, float]:
    fit, test = (next(part.batches(len(part))) for part in (target.data.fit, target.data.test))
    retained = fit[[i for i, c in enumerate(target.data.fit.labels.tolist()) if c in (0, 1)]]
    result = {}
    for key, model in (("recall", target.model), ("recall_plain", target.unsettled)):
        again = copy.deepcopy(model)
        again[1].momentum = 1.0
        again.train()(retained)
        result[key] = found(target, again.eval()(test).argmax(1).tolist(), set(FORGOTTEN))
    return result


def probe(target: Attacked) -> dict[str, float]:
    """The ridge regression as least squares on augmented rows."""
    rows, labels, test = scaled(target)
    design = F.pad(torch.stack(rows), (0, 1), value=1.0)
    width, classes = design.shape[1], sorted(set(labels))
    goal = torch.tensor([[float(k == c) for c in classes] for k in labels]).double()
    ridge = (RIDGE * len(rows)) ** 0.5 * torch.eye(width).double()
    weights = torch.linalg.lstsq(torch.cat([design, ridge]), F.pad(goal, (0, 0, 0, width))).solution
    predicted = [classes[i] for i in (F.pad(torch.stack(test), (0, 1), value=1.0) @ weights).argmax(1).tolist()]
    return {"probe": found(target, predicted, set(FORGOTTEN)), "probe_retain": found(target, predicted, {0, 1})}


def means(target: Attacked) -> dict[str, float]:
    return {"nearest_mean": found(target, by_means(*scaled(target)), set(FORGOTTEN))}


def neighbours(target: Attacked) -> dict[str, float]:
    rows, labels, test = scaled(target)
    predicted = []
    for x in test:
        nearest = sorted(range(len(rows)), key=lambda i: float((x - rows[i]).norm()))[:NEIGHBOURS]
        votes = Counter(labels[i] for i in nearest)
        predicted.append(min(votes, key=lambda c: (-votes[c], c)))
    return {"neighbours": found(target, predicted, set(FORGOTTEN))}


@torch.no_grad()
def head(target: Attacked) -> dict[str, float]:
    predicted = target.original_head(target.test.features).argmax(1).tolist()
    return {"original_head": found(target, predicted, set(FORGOTTEN))}


def prototypes(target: Attacked) -> dict[str, float]:
    """The features are standardised by what is left to learn from."""
    used = [i for i, c in enumerate(target.data.fit.labels.tolist()) if c not in EARLIER]
    labels = target.data.fit.labels[used].tolist()
    few = [i for i, c in enumerate(labels) if c not in FORGOTTEN or labels[:i].count(c) < SHOTS]
    rows, test = target.fit.features[used][few].double(), target.test.features.double()
    mean, spread = rows.mean(0), rows.std(0)
    predicted = by_means(list((rows - mean) / spread), [labels[i] for i in few], list((test - mean) / spread))
    return {"relearn": found(target, predicted, set(FORGOTTEN))}


@torch.no_grad()
def membership(target: Attacked) -> dict[str, float]:
    def scores(samples: Samples) -> list[float]:
        rows = [i for i, c in enumerate(samples.labels.tolist()) if c in FORGOTTEN]
        logits = target.model(torch.stack([samples.load(i) for i in rows])).double()
        return [-float(F.cross_entropy(x, torch.tensor(FORGOTTEN[0]))) for x in logits]

    pairs = [(m > o) + 0.5 * (m == o) for m in scores(target.members) for o in scores(target.data.test)]
    return {"membership": sum(pairs) / len(pairs)}


# What each attack gives, worked out sample by sample; a new attack needs a row here.
BY_HAND: dict[str, Callable[[Attacked], dict[str, float]]] = {
    "accuracy": accuracy,
    "batchnorm-recall": norm_recall,
    "divergence": kl,
    "linear-probe": probe,
    "membership": membership,
    "nearest-mean": means,
    "nearest-neighbours": neighbours,
    "original-head": head,
    "relearn": prototypes,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_measures_what_it_says(target: Attacked, name: str) -> None:
    with torch.no_grad():
        result = ATTACKS[name].run(target)
    assert list(result) == [m.key for m in ATTACKS[name].measures]
    assert result == pytest.approx(BY_HAND[name](target), abs=1e-6)
    shares = [result[m.key] for m in ATTACKS[name].measures if m.unit == "%" and m.key != "worst_loss"]
    assert all(0 <= value <= 1 for value in shares)


@torch.no_grad()
def test_an_audit_lists_every_measure_once_and_those_that_need_least_first(target: Attacked) -> None:
    assert set(attack(target)) == set(measures()) and len({m.label for m in measures().values()}) == len(measures())
    keys = list(measures())
    assert keys.index("recall") < keys.index("probe") < keys.index("relearn") < keys.index("membership")


def clusters(seed: int, n: int = 60, classes: int = 3, d: int = 6, gap: float = 6.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(n) + 4
    centres = gap * torch.eye(classes, d)
    return centres[labels - 4] + torch.randn(len(labels), d, generator=generator), labels


READERS = [linear_probe, nearest_mean, nearest_neighbours]


@pytest.mark.parametrize("attack", READERS)
def test_an_attack_reads_what_is_there(attack) -> None:
    fit, labels = clusters(0)
    test, truth = clusters(1)
    assert (attack(fit, labels, test) == truth).double().mean() > 0.97


@pytest.mark.parametrize("attack", READERS)
def test_an_attack_cannot_read_what_is_not(attack) -> None:
    fit, labels = clusters(0, n=200, gap=0.0)
    test, truth = clusters(1, n=200, gap=0.0)
    assert (attack(fit, labels, test) == truth).double().mean() < 0.45


@pytest.mark.parametrize("attack", READERS)
def test_scale_and_dead_features_do_not_matter(attack) -> None:
    fit, labels = clusters(0, gap=2.0)
    test, _ = clusters(1, gap=2.0)
    scale = torch.tensor([1.0, 1e3, 1e-3, 1.0, 5.0, 1.0])
    dead = torch.full((len(fit), 1), 7.0)
    expected = attack(fit, labels, test)
    found = attack(torch.cat([fit * scale, dead], 1), labels, torch.cat([test * scale, dead], 1))
    assert torch.equal(found, expected)


def test_relearning_sees_no_more_than_its_shots() -> None:
    fit, labels = clusters(0)
    test, truth = clusters(1)
    later = torch.nonzero(labels == 5).flatten()[10:]
    poisoned = fit.clone()
    poisoned[later] = 1e3
    expected = relearn(fit, labels, test, [5])
    assert torch.equal(relearn(poisoned, labels, test, [5]), expected)
    assert (expected == truth)[truth == 5].double().mean() > 0.9


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_auc_counts_pairs(members: list[int], others: list[int]) -> None:
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert auc(torch.tensor(members), torch.tensor(others)) == pytest.approx(sum(pairs) / len(pairs))
