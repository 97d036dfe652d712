"""The held-out table against its definitions, item by item in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from modhifi.bounds import constant_predictor
from modhifi.bounds.held_out import HeldOut, Logits, run_held_out, tabulate, tabulate_several
from modhifi.data.samples import Samples
from modhifi.errors import GateFailed, ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import PADDING

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def samples_of(items: list[Tensor] | Tensor, labels: Tensor | None = None) -> Samples:
    names = tuple(f"item {i}" for i in range(len(items)))
    return Samples(lambda i: items[i], names, labels, names, "inputs", False)


def tabulated(original: Logits, edited: Logits, held: Samples, batch_size: int = 32, **how: bool) -> HeldOut:
    (table,) = run_held_out(original, [edited], held, batch_size, **how)  # type: ignore[arg-type]
    return table


def linear(seed: int, inputs: int = 6, outputs: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).eval().requires_grad_(False).double()


def items(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)).double()


def bigram(seed: int, vocabulary: int = 7) -> nn.Module:
    """A language model whose next token depends on the last one alone."""
    torch.manual_seed(seed)
    return nn.Embedding(vocabulary, vocabulary).eval().requires_grad_(False).double()


def on_tokens(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch.clamp(min=0).to(next(model.parameters()).device))


def texts(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 7, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("device", DEVICES)
def test_columns_of_images_equal_their_definitions(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constant_predictor, "CHUNK_ELEMENTS", 8)
    dense, edited, x = linear(0), linear(1), items(9)
    first, second = dense(x), edited(x)
    p, q = first.softmax(-1), second.softmax(-1)
    dense, edited = dense.to(device), edited.to(device)
    table = tabulated(lambda b: dense(b.to(device)), lambda b: edited(b.to(device)), samples_of(x), 4)
    assert all(getattr(table, name).dtype == torch.float64 for name in ("agreement", "error", "kl", "energy", "flips"))
    torch.testing.assert_close(table.agreement, (first.argmax(-1) == second.argmax(-1)).double())
    torch.testing.assert_close(table.squared_error, (first - second).square().sum(-1), **EXACT)
    torch.testing.assert_close(table.error, (first - second).norm(dim=-1), **EXACT)
    torch.testing.assert_close(table.energy, first.square().sum(-1), **EXACT)
    torch.testing.assert_close(table.kl, kl_div(q.log(), p, reduction="none").sum(-1), **EXACT)
    torch.testing.assert_close(table.total_variation, (p - q).abs().sum(-1) / 2, **EXACT)
    assert table.top_before is not None and table.top_before.dtype == torch.int64
    assert torch.equal(table.top_before, first.argmax(-1)) and torch.equal(table.top_after, second.argmax(-1))
    assert not table.sequences and table.nll_growth is None
    expected = float((first - second).square().sum() / first.square().sum())
    assert table.summary()["n"] == 9 and table.summary()["relative_error"] == pytest.approx(expected, rel=1e-9)


def test_the_constant_of_images_equals_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constant_predictor, "CHUNK_ELEMENTS", 8)
    dense, x = linear(0), items(40)
    rows = dense(x)
    p = rows.softmax(-1)
    constant = tabulated(dense, linear(1), samples_of(x), 7).constant
    assert constant.flips == pytest.approx(1 - int(rows.argmax(-1).bincount().max()) / 40)
    assert constant.total_variation == pytest.approx(float((p - p.mean(0)).abs().sum(-1).mean() / 2), rel=1e-9)
    torch.testing.assert_close(constant.errors, (rows - rows.mean(0)).norm(dim=-1), **EXACT)
    assert constant.error == pytest.approx(float(constant.errors.square().mean().sqrt())) and math.isnan(constant.nll)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_sequences_are_units_and_padding_counts_for_nothing(
    device: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constant_predictor, "CHUNK_ELEMENTS", 40)
    monkeypatch.setattr(constant_predictor, "CONSTANT_SEQUENCES", 4)
    tokens = texts([5, 9, 1, 7, 2, 9])
    dense, edited = bigram(0), bigram(1)
    ours, theirs = [dense(t) for t in tokens], [edited(t) for t in tokens]
    runs = (partial(on_tokens, model.to(device)) for model in (dense, edited))
    table = tabulated(*runs, samples_of(tokens), size, next_tokens=True)
    for i, (t, a, b) in enumerate(zip(tokens, ours, theirs, strict=True)):
        p, q = a.softmax(-1), b.softmax(-1)
        expected = {
            "agreement": (a.argmax(-1) == b.argmax(-1)).double().mean(),
            "squared_error": (a - b).square().sum(-1).mean(),
            "energy": a.square().sum(-1).mean(),
            "kl": kl_div(q.log(), p, reduction="none").sum(-1).mean(),
            "total_variation": (p - q).abs().sum(-1).mean() / 2,
            "error": (a - b).norm(),
            "nll_before": cross_entropy(a[:-1], t[1:]),  # NaN for a single token
            "nll_after": cross_entropy(b[:-1], t[1:]),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(table, name)[i], value, equal_nan=True, **EXACT, msg=name)
    assert table.sequences and table.top_before is None and table.positions.tolist() == [len(t) for t in tokens]
    assert table.nll_growth is not None and len(table.nll_growth) == 5
    losses = [
        sum(float(cross_entropy(o[:-1], t[1:], reduction="sum")) for o, t in zip(side, tokens, strict=True))
        for side in (ours, theirs)
    ]
    count = sum(len(t) - 1 for t in tokens)
    assert table.perplexities() == pytest.approx([math.exp(loss / count) for loss in losses], rel=1e-9)
    # The constant predictor is known from the first four sequences.
    rows = torch.cat(ours[:4])
    mean = rows.softmax(-1).mean(0)
    variations = [((o.softmax(-1) - mean).abs().sum(-1) / 2).mean() for o in ours[:4]]
    assert table.constant.total_variation == pytest.approx(float(torch.stack(variations).mean()), rel=1e-9)
    missed = [float(-mean.log()[t[1:]].mean() - n) for t, n in zip(tokens[:4], table.nll_before, strict=False)]
    assert table.constant.nll == pytest.approx(sum(m for m in missed if not math.isnan(m)) / 3, rel=1e-9)
    errors = torch.stack([(o - rows.mean(0)).norm() for o in ours[:4]])
    torch.testing.assert_close(table.constant.errors, errors, **EXACT)


def test_each_sample_is_decoded_and_run_once() -> None:
    decoded: list[int] = []
    seen = {"dense": 0, "edited": 0}

    def load(i: int) -> Tensor:
        decoded.append(i)
        return torch.randn(6)

    def counting(name: str, batch: Tensor) -> Tensor:
        seen[name] += len(batch)
        return batch

    names = tuple(map(str, range(70)))
    table = tabulated(
        partial(counting, "dense"), partial(counting, "edited"), Samples(load, names, None, names, "", False), 32
    )
    assert seen == {"dense": 70, "edited": 70} and decoded == list(range(70))
    assert table.seconds and all(seconds > 0 for pair in table.seconds for seconds in pair)


def test_accuracies_count_labels() -> None:
    dense, x = linear(0), items(20)
    labels = dense(x).argmax(-1)
    labels[:5] = (labels[:5] + 1) % 4
    before, after = tabulated(dense, lambda b: -dense(b), samples_of(x), 7).accuracies(labels)
    assert before == 0.75 and after == float((dense(x).argmin(-1) == labels).double().mean())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0, 1e4), classes=st.integers(1, 12))
def test_divergences_stay_in_their_ranges(seed: int, scale: float, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (scale * torch.randn(5, classes, generator=generator) for _ in range(2))
    table = tabulated(lambda _: first, lambda _: second, samples_of(first), 5)
    assert (table.total_variation >= 0).all() and (table.total_variation <= 1 + 1e-12).all()
    # Pinsker: the total variation is at most √(KL / 2).
    assert (table.total_variation <= ((table.kl + 1e-7) / 2).sqrt() * (1 + 1e-3)).all()  # logits are float32


def test_a_model_agrees_with_itself() -> None:
    table = tabulated(linear(0), linear(0), samples_of(items(5)))
    assert table.agreement.eq(1).all() and table.squared_error.eq(0).all()
    assert table.kl.eq(0).all() and table.total_variation.eq(0).all()
    assert math.isnan(replace(table, energy=torch.zeros(5)).relative_error)
    assert table.seconds == ()  # one batch, which warms up


def broken(kind: str) -> Iterator[object]:
    dense, x = linear(0), items(4)
    endless = x.clone()
    endless[2] = math.inf
    if kind == "original":
        yield tabulated(dense, dense, samples_of(endless))
    if kind == "edited":
        yield tabulated(lambda b: torch.zeros(len(b), 4), dense, samples_of(endless), 3)
    if kind == "none":
        yield tabulated(dense, dense, samples_of(items(0)))
    if kind == "shapes":
        yield tabulated(dense, linear(0, outputs=3), samples_of(x))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("original", ModhifiError, "original model's output is not finite on 'item 2'"),
        ("edited", GateFailed, "modified model's output is not finite on 'item 2'"),
        ("none", ModhifiError, "give at least one"),
        ("shapes", ModhifiError, "cannot be compared"),
    ],
)
def test_what_cannot_be_compared_is_named(kind: str, error: type[ModhifiError], message: str) -> None:
    with pytest.raises(error, match=message):
        next(broken(kind))


class Loud(nn.Module):
    """Two layers that compute a multiple of their inputs, with a multiplication between."""

    def __init__(self, between: float, behind: float) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), between
        nn.init.eye_(self.a.weight)
        self.b.weight = nn.Parameter(behind * torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.between)


@pytest.mark.parametrize("which", ["original", "modified"])
@pytest.mark.parametrize(
    ("dtype", "between", "behind", "message"),
    [
        (torch.float32, 1.0, 1e37, "first what its layer 'b' computes; it cannot be bounded; check its weights"),
        (torch.float32, 1e38, 1.0, "first what its layer 'b' reads; it cannot be bounded; check its weights"),
        (
            torch.float16,
            1.0,
            6e3,
            "first what its layer 'b' computes; it cannot be bounded; give the model in bfloat16",
        ),
    ],
)
def test_an_overflow_is_named_with_its_layer(
    which: str, dtype: torch.dtype, between: float, behind: float, message: str
) -> None:
    x = torch.ones(6, 3, dtype=dtype)
    x[4] = 50.0
    loud, quiet = Loud(between, behind).to(dtype), Loud(1.0, 1.0).to(dtype)
    dense, edited = (loud, quiet) if which == "original" else (quiet, loud)
    error = ModhifiError if which == "original" else GateFailed
    with pytest.raises(error, match=f"^the {which} model's output is not finite on 'item 4', {message}"):
        tabulate(load_model(dense, example=x[:2]), edited.eval(), samples_of(x), 3)


def test_perplexity_of_a_uniform_model_is_the_size_of_the_vocabulary() -> None:
    def uniform(batch: Tensor) -> Tensor:
        return torch.zeros(*batch.shape, 11)

    table = tabulated(uniform, uniform, samples_of(texts([4, 4])), 2, next_tokens=True)
    assert table.perplexities() == pytest.approx((11, 11))


def test_perplexity_needs_two_tokens() -> None:
    run = partial(on_tokens, bigram(0))
    with pytest.raises(ModhifiError, match="two tokens"):
        tabulated(run, run, samples_of(texts([1, 1, 1])), 2, next_tokens=True).perplexities()


def test_padding_of_a_loaded_model_changes_nothing() -> None:
    from tiny_text import llama

    loaded = replace(load_model(llama(), example=torch.ones(2, 12, dtype=torch.long)), kind="text")
    short = [torch.randint(3, 20, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 3, 7)]
    held = samples_of(short)
    assert int((next(held.batches(4)) == PADDING).sum()) == 12

    def columns(table: HeldOut) -> Tensor:
        assert table.nll_growth is not None
        return torch.stack([table.kl, table.agreement, table.error, table.nll_growth])

    other = load_model(llama(intermediate_size=20)).model
    together, alone = (tabulate(loaded, other, held, size) for size in (4, 1))
    torch.testing.assert_close(columns(together), columns(alone), rtol=1e-4, atol=1e-6)


def test_several_edited_models_are_compared_with_one_run_of_the_original() -> None:
    torch.manual_seed(0)
    x, runs = items(7).float(), []
    dense, *edited = (nn.Sequential(linear(seed)).float().eval() for seed in (0, 1, 2))
    dense.register_forward_hook(lambda *_: runs.append(1))
    loaded = load_model(dense, example=x[:2])
    alone = [tabulate(loaded, model, samples_of(x), 4) for model in edited]
    del runs[:]
    together = tabulate_several(loaded, edited, samples_of(x), 4)
    assert len(runs) == 2
    for one, other in zip(together, alone, strict=True):
        assert one.summary() == other.summary()
        assert one.top_after is not None and other.top_after is not None
        assert torch.equal(one.top_after, other.top_after)
