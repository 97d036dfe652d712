"""Windows cut from files and data sets, told apart by document, and padding that leaves no trace."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import tiny_text
import torch
import transformers
from torch import nn

from modhifi.calibration.collect import collect
from modhifi.calibration.sampling import Sampling
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.data.text import window_of
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import PADDING, LoadedModel
from modhifi.pruning.stages import find_structure
from modhifi.structure.operators import operator_modules


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(tiny_text.save(tmp_path_factory.mktemp("llama")))


def text_file(tmp_path: Path, text: str) -> str:
    (tmp_path / "text.txt").write_text(text)
    return f"text:{tmp_path / 'text.txt'}"


def test_windows_are_the_tokens_of_the_articles(loaded: LoadedModel, tmp_path: Path) -> None:
    spec = text_file(tmp_path, tiny_text.articles(6))
    samples = load_samples(spec, loaded, n=1000, window=32)
    assert len(samples) == len(set(samples.hashes)) > 30 and not samples.synthetic
    expected = set()
    for article in tiny_text.articles(6).split(" = Title")[1:]:
        ids = loaded.tokenizer(" = Title" + article, add_special_tokens=False)["input_ids"]
        expected |= {(1, *ids[i : i + 31]) for i in range(0, len(ids) - 30, 31)}
    assert {tuple(samples.load(i).tolist()) for i in range(len(samples))} == expected
    few = load_samples(spec, loaded, n=6, window=32)
    assert len(set(few.units)) == 6, "few windows come from as many articles as there are"
    again = load_samples(spec, loaded, n=6, window=32)
    assert few.fingerprint() == again.fingerprint() != load_samples(spec, loaded, n=6, window=32, seed=1).fingerprint()


def test_no_article_is_on_both_sides(loaded: LoadedModel, tmp_path: Path) -> None:
    samples = load_samples(text_file(tmp_path, tiny_text.articles(8)), loaded, n=60, window=16)
    ours, theirs = samples.split(40, 20)
    assert not set(ours.units) & set(theirs.units)
    assert 25 <= len(ours) <= 40 and 10 <= len(theirs) <= 20


def test_one_long_text_is_cut_into_stretches(loaded: LoadedModel, tmp_path: Path) -> None:
    samples = load_samples(text_file(tmp_path, tiny_text.write(0, 6000)), loaded, n=10, window=16)
    assert "10 windows of 16 tokens from 10 places in one text" in samples.description
    ours, theirs = samples.split(7, 3)
    assert (len(ours), len(theirs)) == (7, 3)


def test_split_without_documents_is_by_order() -> None:
    samples = Samples(lambda i: torch.tensor([i]), tuple("abcdefgh"), None, tuple("abcdefgh"), "", False)
    ours, theirs = samples.split(6, 2)
    assert (ours.hashes, theirs.hashes) == (tuple("abcdef"), tuple("gh"))
    assert [len(part) for part in samples.split(30, 10)] == [6, 2]


@pytest.mark.parametrize(
    ("count", "asked", "got"),
    [
        (62, (10_000, 256), (49, 13)),
        (1000, (10_000, 256), (800, 200)),
        (5000, (10_000, 256), (4744, 256)),
        (20_000, (10_000, 256), (10_000, 256)),
        (62, (256, 256), (31, 31)),
        (62, (60, 2), (60, 2)),
    ],
)
def test_a_short_source_keeps_a_fifth_to_hold_out(count: int, asked: tuple[int, int], got: tuple[int, int]) -> None:
    names = tuple(map(str, range(count)))
    parts = Samples(lambda i: torch.tensor([i]), names, None, names, "", False).split(*asked)
    assert tuple(map(len, parts)) == got


def test_folders_and_short_documents(loaded: LoadedModel, tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(tiny_text.write(i, 60 if i else 12))
    samples = load_samples(f"text:{tmp_path}", loaded, n=100, window=24)
    assert len(set(samples.units)) == 4, "the document shorter than a window is left out"
    short = tmp_path / "short"
    short.mkdir()
    for i in range(5):
        (short / f"{i}.txt").write_text(tiny_text.write(i, 12) + "\n")
    joined = load_samples(f"text:{short}", loaded, n=100, window=24)
    assert len(joined) == 60 // 23, "documents shorter than a window are read as one text"


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/0.txt", "__MACOSX/0.txt", ".git/deep/0.md", "._0.txt"])
def test_hidden_folders_and_files_hold_no_text(loaded: LoadedModel, tmp_path: Path, hidden: str) -> None:
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(tiny_text.write(i, 60))
    plain = load_samples(f"text:{tmp_path}", loaded, n=100, window=24)
    (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / hidden).write_text(tiny_text.write(7, 60))
    assert load_samples(f"text:{tmp_path}", loaded, n=100, window=24).hashes == plain.hashes


@pytest.mark.parametrize(
    ("text", "window", "message"),
    [
        ("bara bamo bani", 16, r"holds 3 tokens, less than one window of 16; give a longer text or a smaller --window"),
        ("bara bamo bani", 128, r"windows of 128 tokens were asked for and .* takes 64 at most"),
        (b"\xff\xfe\xfd", 16, "as UTF-8 text"),
    ],
)
def test_texts_that_do_not_do(
    loaded: LoadedModel, tmp_path: Path, text: str | bytes, window: int, message: str
) -> None:
    (tmp_path / "text.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModhifiError, match=message):
        load_samples(f"text:{tmp_path / 'text.txt'}", loaded, n=4, window=window)


def test_missing_text_tokenizer_and_embedding(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ModhifiError, match="no text at"):
        load_samples(f"text:{tmp_path / 'nothing.txt'}", loaded, n=4)
    spec = text_file(tmp_path, tiny_text.articles(4))
    bare = load_model(tiny_text.save(tmp_path / "bare", with_tokenizer=False))
    with pytest.raises(ModhifiError, match="without a tokenizer"):
        load_samples(spec, bare, n=4)
    narrow = load_model(tiny_text.save(tmp_path / "narrow", vocab_size=20))
    with pytest.raises(ModhifiError, match="do not belong together"):
        load_samples(spec, narrow, n=4)


class Table(list):
    """The part of a ``datasets.Dataset`` that modhifi uses."""

    def __init__(self, rows: list[dict[str, object]]) -> None:
        super().__init__(rows)
        self.features = {"id": types.SimpleNamespace(dtype="int64"), "text": types.SimpleNamespace(dtype="string")}


@pytest.mark.parametrize("long", [True, False])
def test_datasets(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    texts = [tiny_text.write(i, 96) for i in range(8)] if long else tiny_text.articles(5).split("\n")
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, split: Table(  # type: ignore[attr-defined]
        [{"id": i, "text": t} for i, t in enumerate(texts)]
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    samples = load_samples("hf:some/text", loaded, n=40, window=16)
    assert len(set(samples.units)) == (8 if long else 5)


def padded(lengths: list[int]) -> Samples:
    items = [torch.randint(3, tiny_text.VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    names = tuple(map(str, lengths))
    return Samples(lambda i: items[i], names, None, names, "short texts", False)


def test_padding_leaves_no_trace_in_moments(loaded: LoadedModel) -> None:
    samples, model = padded([5, 9, 3, 7]), loaded.model
    batch = next(samples.batches(4))
    assert batch.shape == (4, 9) and int((batch == PADDING).sum()) == 12
    readers = dict(operator_modules(model, find_structure(loaded).prunable))
    every = Sampling(rows_per_column=None)
    real = loaded.real_tokens
    together = collect(model, loaded.run, samples.batches(4), readers, every, samples=4, real=real)
    alone = collect(model, loaded.run, samples.batches(1), readers, every, samples=4, real=real)
    for name in readers:
        assert together[name].n == alone[name].n == 24
        torch.testing.assert_close(together[name].gram, alone[name].gram, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together[name].mean, alone[name].mean, rtol=1e-4, atol=1e-6)


def test_padding_is_masked_out_of_an_encoders_attention() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=tiny_text.VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    loaded = load_model(transformers.BertForMaskedLM(config))
    samples = padded([4, 9])
    batch = next(samples.batches(2))
    torch.testing.assert_close(loaded.logits(batch)[:1, :4], loaded.logits(batch[:1, :4]), rtol=1e-4, atol=1e-5)


def test_a_pass_for_moments_leaves_the_logits_out(loaded: LoadedModel) -> None:
    seen: list[torch.Size] = []
    handle = loaded.model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    loaded.run(loaded.example)
    loaded.logits(loaded.example)
    handle.remove()
    assert [shape[1] for shape in seen] == [1, loaded.example.shape[1]]
    load_model(nn.Flatten(), example=torch.zeros(2, 3)).run(torch.zeros(2, 3))


@torch.no_grad()
def test_a_table_of_positions_that_begins_behind_the_padding_takes_fewer_tokens() -> None:
    """RoBERTa's: 514 rows for 512 tokens."""
    config = transformers.RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=34,
    )
    loaded = load_model(transformers.RobertaForMaskedLM(config).eval())
    assert window_of(loaded, None) == 32
    loaded.logits(torch.full((1, 32), 7))
    with pytest.raises(ModhifiError, match="33 tokens were asked for and module:RobertaForMaskedLM takes 32 at most"):
        window_of(loaded, 33)
