"""Block by block gives what a whole pass gives, and holds one block's Grams at a time."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import tiny_text
import torch
import transformers
from counting import Dispatched
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modhifi.calibration.block_stream import Stream, find_blocks, moments_by_block
from modhifi.calibration.collect import collect
from modhifi.calibration.memory import gram_bytes
from modhifi.calibration.moments import Moments
from modhifi.calibration.sampling import Sampling
from modhifi.calibration.timeline import Timeline
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning import blockwise
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import find_structure


def gemma() -> transformers.PreTrainedModel:
    """Blocks of two kinds, with a sliding and with a full attention mask."""
    config = transformers.Gemma2Config(
        vocab_size=tiny_text.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        head_dim=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config).eval()


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=tiny_text.VOCABULARY,
            n_embd=16,
            n_layer=3,
            n_head=2,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def bert() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=tiny_text.VOCABULARY,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
        )
    ).eval()


MODELS = {"llama": lambda: tiny_text.llama(num_hidden_layers=3), "gemma2": gemma, "gpt2": gpt2, "bert": bert}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_give_what_the_whole_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(MODELS[name]())
    samples = tiny_text.token_samples([12, 9, 12, 5, 12, 12])
    settings = PruneSettings(layout="uniform", rows_per_column=None, batch_size=2)
    before = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    ours = prune_model(loaded, samples, Budget("components", 0.78), settings)
    assert all(torch.equal(v, before[k]) for k, v in loaded.model.state_dict().items())
    monkeypatch.setattr("modhifi.pruning.prune.prune_in_blocks", lambda *_: None)
    theirs = prune_model(loaded, samples, Budget("components", 0.78), settings)
    assert ours.plan.kept == theirs.plan.kept and len(ours.plan.kept) >= 3
    for (k, a), b in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=k)
    for a, b in zip(ours.errors, theirs.errors, strict=True):
        assert a.reader == b.reader and a.relative == pytest.approx(b.relative, rel=1e-4, abs=1e-9)


def test_the_stream_is_the_models_own_pass() -> None:
    model = gemma()
    timeline = Timeline(model, lambda: model(torch.tensor([[1, 2]]), use_cache=False))
    blocks = find_blocks(timeline)
    assert blocks == ("model.layers.0", "model.layers.1", "model.layers.2")
    batch = torch.randint(3, tiny_text.VOCABULARY, (2, 12))
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(b).register_forward_hook(lambda m, a, out, b=b: seen.setdefault(b, out)) for b in blocks
    ]
    with torch.no_grad():
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    stream = Stream(model, blocks, lambda x: model(x, use_cache=False), timeline)
    for block in blocks:
        stream.advance([batch])
        assert torch.equal(stream.cache.remembered[0].outputs[block], seen[block])


class Transfers(TorchDispatchMode):
    """Counts the tensors of some elements that are copied from device to device."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].numel() == self.elements:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("depth", [3, 6])
def test_stubbed_blocks_move_nothing(depth: int) -> None:
    """A batch goes to the device and back once for each block, whatever stands before that block."""
    model, batch = tiny_text.llama(num_hidden_layers=depth), torch.randint(3, tiny_text.VOCABULARY, (2, 11))
    timeline = Timeline(model, lambda: model(batch, use_cache=False))
    stream = Stream(model, find_blocks(timeline), lambda x: model(x, use_cache=False), timeline)
    with Transfers(2 * 11 * 16) as transfers:
        for _ in range(depth):
            stream.advance([batch, batch])
    assert transfers.count == 2 * (2 * depth - 1)


def test_a_deep_block_costs_what_an_early_one_does() -> None:
    model, batch = tiny_text.llama(num_hidden_layers=12), torch.randint(3, tiny_text.VOCABULARY, (2, 11))
    timeline = Timeline(model, lambda: model(batch, use_cache=False))
    stream = Stream(model, find_blocks(timeline), lambda x: model(x, use_cache=False), timeline)
    operations, moved = [], []
    for _ in stream.blocks:
        with Dispatched() as dispatched:
            stream.advance([batch, batch])
        operations.append(dispatched.count)
        moved.append(dispatched.copied)
    # the first block reads no output of another
    assert operations[0] < operations[1] and moved[0] < moved[1]
    assert len(set(moved[1:])) == 1 and len(set(operations[1:])) == 1, (operations, moved)


class AddsInPlace(nn.Module):
    """A block that gives its input back, changed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.linear(x).tanh())


class Skips(nn.Module):
    """The last block reads what the first one put out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        x = self.blocks[2](self.blocks[1](first))
        return self.blocks[3](x.mul_(2) + first)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([AddsInPlace() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("build", [Chain, Skips])
@torch.no_grad()
def test_blocks_that_change_or_skip_are_measured_as_in_a_whole_pass(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, batches = build(), list(torch.randn(3, 5, 4))
    timeline = Timeline(model, lambda: model(batches[0]))
    blocks = find_blocks(timeline)
    readers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    every = Sampling(rows_per_column=None)
    whole = collect(model, model, batches, readers, every, samples=15)
    stream = Stream(model, blocks, model, timeline)
    streamed = moments_by_block(stream, batches, readers, every, samples=15)
    found = {name: moments for block in streamed for name, moments in block.items()}
    assert found.keys() == whole.keys() and len(blocks) == len(readers)
    for name, moments in whole.items():
        assert torch.equal(found[name].cov, moments.cov) and torch.equal(found[name].mean, moments.mean)


def test_large_grams_are_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(gpt2())
    structure = find_structure(loaded)
    monkeypatch.setattr(blockwise, "MOST_BYTES", 3 * (64 * 64 + 16 * 16) * 8)
    assert blockwise.fit_in_memory(loaded.model, structure)
    monkeypatch.setattr(blockwise, "MOST_BYTES", 3 * (64 * 64 + 16 * 16) * 8 - 1)
    assert not blockwise.fit_in_memory(loaded.model, structure)


def test_models_without_blocks_have_none() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    assert find_blocks(Timeline(model, lambda: model(torch.zeros(1, 4)))) == ()


@pytest.mark.parametrize("blocks, alive", [(1, [2] * 5), (2, [4, 4, 2]), (5, [10])])
def test_few_blocks_grams_at_a_time(blocks: int, alive: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: LoadedModel = load_model(tiny_text.llama(num_hidden_layers=5))
    readers = [loaded.model.get_submodule(f"model.layers.0.{name}") for name in ("self_attn.o_proj", "mlp.down_proj")]
    monkeypatch.setattr(blockwise, "TOGETHER", blocks * sum(map(gram_bytes, readers)))
    held: list[weakref.ref[Moments]] = []
    seen: list[int] = []
    curves = blockwise.removal_curves

    def counting(
        model: object, structure: object, moments: dict[str, Moments], settings: object, **more: object
    ) -> object:
        held.extend(weakref.ref(m) for m in moments.values())
        seen.append(sum(ref() is not None for ref in held))
        return curves(model, structure, moments, settings, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(blockwise, "removal_curves", counting)
    settings = PruneSettings(layout="uniform", rows_per_column=None, batch_size=2)
    ours = prune_model(loaded, tiny_text.token_samples([12] * 4), Budget("components", 0.5), settings)
    assert seen == alive  # behind the attention and behind the feed-forward layer of every block
    monkeypatch.setattr("modhifi.pruning.prune.prune_in_blocks", lambda *_: None)
    theirs = prune_model(loaded, tiny_text.token_samples([12] * 4), Budget("components", 0.5), settings)
    assert ours.plan.kept == theirs.plan.kept
