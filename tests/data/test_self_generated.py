"""Text that a model writes itself: from its own beginnings, seeded, no loops, as its own distribution says."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_text
import torch
import transformers

from modhifi.data import self_generated
from modhifi.data.beginnings import beginnings
from modhifi.data.resampling import Resampler
from modhifi.data.samples import Samples
from modhifi.data.self_generated import Continuer, Script
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel

CHAT = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"


def of_kind(samples: Samples, kind: str) -> torch.Tensor:
    """The windows of one kind, in order."""
    return torch.stack([samples.load(i) for i, name in enumerate(samples.names) if name.endswith(f", {kind}")])


def test_windows_are_full_seeded_and_of_every_kind(tmp_path: Path) -> None:
    loaded = load_model(tiny_text.save(tmp_path))
    loaded.tokenizer.chat_template = CHAT
    samples = load_samples("self", loaded, n=40, window=12)
    windows = torch.stack([samples.load(i) for i in range(40)])
    assert windows.shape == (40, 12) and len(set(samples.hashes)) == 40 and samples.synthetic
    assert [name.partition(", ")[2] for name in samples.names[:4]] == ["beginning", "chat", "openings", "beginning"]
    own, chat, openings = (of_kind(samples, kind) for kind in ("beginning", "chat", "openings"))
    assert [len(own), len(chat), len(openings)] == [14, 13, 13]
    assert (own[:, 0] == 1).all() and (own[:, 1] != own[0, 1]).any()
    assert (chat[:, :2] == torch.tensor([1, 0])).all()  # "<s> user", of which the second word is not known
    special = torch.tensor(loaded.tokenizer.all_special_ids)
    assert not torch.isin(openings[:, 0], special).any() and len(openings[:, 0].unique()) > 6
    assert samples.description.startswith(
        "self, 40 windows of 12 tokens, 14 written from the tokenizer's own beginning [1], 13 written from the user's "
        "turn of the chat template, 13 written from one of 49 tokens at random, sampled at temperature 1 from the "
    )
    assert load_samples("synthetic", loaded, n=40, window=12).hashes == samples.hashes
    assert load_samples("self", loaded, n=40, window=12, seed=1).hashes != samples.hashes
    assert len(of_kind(load_samples("self", loaded, n=1, window=12), "beginning")) == 1


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no user') }}", "{% for m in messages %}{% endfor %}x"])
def test_a_template_that_takes_no_user_gives_no_chats(tmp_path: Path, template: str | None) -> None:
    loaded = load_model(tiny_text.save(tmp_path))
    loaded.tokenizer.chat_template = template
    assert [beginning.name for beginning in beginnings(loaded)] == ["beginning", "openings"]


def test_written_windows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(tiny_text.save(tmp_path / "model"))
    first = self_generated.write(loaded, 6, window=12, cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(self_generated, "_written", None)
        again = self_generated.write(loaded, 6, window=12, cache=tmp_path)
    assert again.hashes == first.hashes and (again.names, again.description) == (first.names, first.description)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(-1)
    assert self_generated.write(loaded, 6, window=12, cache=tmp_path).hashes != first.hashes


def test_a_beginning_that_texts_do_not_have_is_left_out(tmp_path: Path) -> None:
    loaded = load_model(tiny_text.save(tmp_path))
    whole = of_kind(load_samples("self", loaded, n=8, window=13), "beginning")
    bare = replace(loaded, tokenizer=tiny_text.tokenizer(begin=False))
    without = load_samples("self", bare, n=8, window=12)
    assert "the token of the beginning (1), left out" in without.description
    assert torch.equal(of_kind(without, "beginning"), whole[:, 1:])


@pytest.mark.parametrize(("begin", "front"), [(True, 1), (False, 0)])
def test_windows_are_packed_with_short_texts(tmp_path: Path, begin: bool, front: int) -> None:
    loaded = load_model(tiny_text.save(tmp_path))
    loaded = replace(loaded, tokenizer=tiny_text.tokenizer(begin=begin))
    (own, *_) = beginnings(loaded)
    own = replace(own, length=5)
    packed = Script(Continuer(loaded, 14 + front, own), 0, 0)  # three texts of five tokens, the last one cut
    assert packed.fill(10, lambda *told: None) and "3 texts in each" in packed.what(10)
    windows = torch.stack(packed.windows(10))
    assert windows.shape == (10, 14 + front) and (windows[:, :front] == 1).all()
    alone = Script(Continuer(loaded, 5 + front, own), 0, 0)
    assert alone.fill(30, lambda *told: None)
    texts = alone.windows(30)
    one_by_one = [torch.cat([texts[3 * i + k][front:] for k in range(3)])[:14] for i in range(10)]
    assert torch.equal(windows[:, front:], torch.stack(one_by_one))


def test_the_cache_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(tiny_text.save(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # deprecated names of the cache, say
        cached = self_generated.write(loaded, 4, window=10)
    lengths: list[int] = []
    handle = loaded.model.register_forward_pre_hook(
        lambda m, a, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    self_generated.write(loaded, 4, window=10)
    handle.remove()
    assert set(lengths) == {1}  # the cache is used
    whole = loaded.model.forward

    def without_cache(input_ids: torch.Tensor, **_: object) -> transformers.utils.ModelOutput:
        return transformers.utils.ModelOutput(logits=whole(input_ids=input_ids, use_cache=False).logits)

    monkeypatch.setattr(loaded.model, "forward", without_cache)
    assert self_generated.write(loaded, 4, window=10).hashes == cached.hashes


def test_draws_follow_the_models_distribution_in_its_nucleus() -> None:
    logits = torch.tensor([0.01, 0.3, 0.5, 0.03, 0.16]).log().expand(4000, 5)
    drawn = self_generated.draw(logits, torch.Generator().manual_seed(0)).flatten()
    shares = torch.bincount(drawn, minlength=5) / 4000
    torch.testing.assert_close(shares, torch.tensor([0, 0.3, 0.5, 0, 0.16]) / 0.96, atol=0.03, rtol=0)
    certain = torch.tensor([[0.0, 9.0, 0.0]])  # one token alone is more than the nucleus
    assert self_generated.draw(certain, torch.Generator()).tolist() == [[1]]


def test_without_a_beginning_ordinary_words_start(tmp_path: Path) -> None:
    loaded = load_model(tiny_text.save(tmp_path, begin=False))
    samples = load_samples("self", loaded, n=8, window=12)
    starts = set(of_kind(samples, "beginning")[:, 0].tolist())
    assert starts <= set(range(len(tiny_text.SPECIAL), tiny_text.VOCABULARY)) and len(starts) > 1
    assert f"one of {len(tiny_text.WORDS)} ordinary words" in samples.description
    bare = load_model(tiny_text.save(tmp_path / "bare", begin=False, with_tokenizer=False))
    with pytest.raises(ModhifiError, match="without a tokenizer"):
        load_samples("self", bare, n=8)


def test_loops_are_rejected(tmp_path: Path) -> None:
    assert self_generated.is_loop(torch.tensor([1, 2, 3] * 10)) and not self_generated.is_loop(torch.arange(30))
    loaded = load_model(tiny_text.save(tmp_path))
    torch.nn.init.zeros_(loaded.model.lm_head.weight)
    loaded.model.lm_head.weight.data[5] = 1e4 * loaded.model.model.norm.weight
    loaded.model.model.embed_tokens.weight.data[:] = 1.0
    with pytest.raises(ModhifiError, match="writes loops: 76 of 76 texts repeat themselves; give text"):
        load_samples("self", loaded, n=4, window=16)


BERT = transformers.BertConfig(
    vocab_size=tiny_text.VOCABULARY + 3,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    initializer_range=0.5,
)


def masked(kind: type = transformers.BertForMaskedLM) -> LoadedModel:
    """A masked language model; its tokenizer frames texts as BERT's does."""
    torch.manual_seed(0)
    return replace(load_model(kind(BERT).eval()), tokenizer=tiny_text.framing_tokenizer())


def test_masked_models_resample_every_place() -> None:
    loaded = masked()
    samples = load_samples("self", loaded, n=12, window=14)
    windows = torch.stack([samples.load(i) for i in range(12)])
    first, last, mask = (loaded.tokenizer.convert_tokens_to_ids(t) for t in ("[CLS]", "[SEP]", "[MASK]"))
    assert (windows[:, 0] == first).all() and (windows[:, -1] == last).all() and len(set(samples.hashes)) == 12
    special = torch.tensor(loaded.tokenizer.all_special_ids)
    assert mask in special and not torch.isin(windows[:, 1:-1], special).any()
    assert "written from masks alone, 3 sweeps of resampling, 15% masked at once, sampled at" in samples.description
    assert load_samples("synthetic", loaded, n=12, window=14).hashes == samples.hashes
    assert load_samples("self", loaded, n=12, window=14, seed=1).hashes != samples.hashes


def test_resampling_follows_the_model() -> None:
    """A model that expects one token everywhere, and another beside it, writes these."""
    loaded = masked()
    head = loaded.model.cls.predictions
    torch.nn.init.zeros_(head.transform.LayerNorm.weight)
    torch.nn.init.zeros_(head.transform.LayerNorm.bias)
    head.bias.data.fill_(-50.0)
    head.bias.data[[7, 9]] = torch.tensor([0.8, 0.2]).log()
    places = Resampler(loaded, 22).write(20, torch.Generator().manual_seed(0))[:, 1:-1].flatten()
    assert set(places.tolist()) == {7, 9}
    assert float((places == 7).float().mean()) == pytest.approx(0.8, abs=0.06)


def test_encoders_without_a_masked_head_cannot_write() -> None:
    for spec in ("self", "synthetic"):
        with pytest.raises(ModhifiError, match="BertModel. has no masked-language-model head to write text with; give"):
            load_samples(spec, masked(transformers.BertModel), n=4)
    with pytest.raises(ModhifiError, match="has no mask token"):
        load_samples("self", replace(masked(), tokenizer=tiny_text.tokenizer()), n=4)
    with pytest.raises(ModhifiError, match="window of 2 tokens is no longer than the tokenizer's frame"):
        load_samples("self", masked(), n=4, window=2)


@pytest.mark.parametrize("likeliest", [1, 3, 40])
def test_the_tokens_that_are_looked_at_first_change_no_draw(likeliest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw is the first token, from the likeliest on, at which the shares pass its place in the nucleus."""
    monkeypatch.setattr(self_generated, "LIKELIEST", likeliest)
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 51)[:, None] / 10
    drawn = self_generated.draw(logits, torch.Generator().manual_seed(0)).flatten().tolist()
    places = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)).flatten().tolist()
    for row, place, token in zip(logits.softmax(-1).tolist(), places, drawn, strict=True):
        nucleus: list[int] = []
        for index in sorted(range(40), key=lambda i, row=row: -row[i]):  # type: ignore[misc]
            if sum(row[i] for i in nucleus) < self_generated.NUCLEUS:
                nucleus.append(index)
        goal, passed = place * sum(row[i] for i in nucleus), 0.0
        for index in nucleus:
            passed += row[index]
            if passed > goal:
                break
        assert token == index


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 2] = bad
    with pytest.raises(ModhifiError, match="not finite"):
        self_generated.draw(logits, torch.Generator())
