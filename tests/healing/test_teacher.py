"""What a teacher said comes again as it was, from memory or from a file, and is asked again where there is no room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_text
import torch
from torch import Tensor, nn

from modhifi.healing import kept
from modhifi.healing.blocks import Match
from modhifi.healing.kept import InMemory, Kept, OnDisk, room_for
from modhifi.healing.teacher import Teacher
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel

TENSORS = (torch.randn(6, 3, 5), torch.randn(6, 7).bfloat16(), torch.randn(6))
BLOCKS = {f"model.layers.{i}": Match(f"model.layers.{i}") for i in range(2)}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODHIFI_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("where", [InMemory, OnDisk])
def test_what_is_kept_comes_again(where: type, directory: Path) -> None:
    store: Kept = InMemory(6, TENSORS) if where is InMemory else OnDisk(directory, TENSORS)
    for indices in ([4, 0], [5], [1, 2, 3]):
        store.put(indices, [tensor[indices] for tensor in TENSORS])
    for indices in ([0, 1, 2, 3, 4, 5], [3, 3, 5]):
        for got, tensor in zip(store.get(indices), TENSORS, strict=True):
            assert got.dtype == tensor.dtype and torch.equal(got, tensor[indices])
    assert not list(directory.iterdir())


def test_memory_comes_first_then_the_disk_then_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(room_for(6, TENSORS), InMemory)
    monkeypatch.setattr(kept, "MEMORY", 0.0)
    assert isinstance(room_for(6, TENSORS), OnDisk)
    assert room_for(6, TENSORS, processes=10**12) is None
    assert room_for(6, [tensor.to("meta") for tensor in TENSORS]) is None
    monkeypatch.setattr(kept, "DISK", 0.0)
    assert room_for(6, TENSORS) is None
    monkeypatch.setattr(kept, "DISK", 1.0)
    monkeypatch.setenv("MODHIFI_CACHE", "/proc/nothing")
    assert room_for(6, TENSORS) is None


class Changed(nn.Module):
    """A language model that does something to its logits behind the head."""

    def __init__(self, inner: nn.Module, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.config, self.behind = inner, inner.config, behind

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head  # type: ignore[no-any-return, union-attr]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.behind(self.inner(input_ids).logits)


def asked(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that the model reads from here on."""
    batches, real = list[int](), LoadedModel.logits

    def logits(self: LoadedModel, batch: Tensor, model: nn.Module | None = None) -> Tensor:
        batches.append(len(batch))
        return real(self, batch, model)

    monkeypatch.setattr(LoadedModel, "logits", logits)
    return batches


@pytest.mark.parametrize("memory", [1.0, 0.0])
@pytest.mark.parametrize("behind", [None, Tensor.tanh, Tensor.double])
def test_a_language_model_is_asked_once_and_its_logits_are_not_kept(
    behind: Callable[[Tensor], Tensor] | None, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MEMORY", memory)
    model = tiny_text.llama()
    tokens = torch.randint(3, tiny_text.VOCABULARY, (6, 8))
    loaded = load_model(Changed(model, behind), example=tokens[:2]) if behind else load_model(model)
    blocks = {f"inner.{name}": match for name, match in BLOCKS.items()} if behind else BLOCKS
    teacher, batches = Teacher(loaded, blocks, 6, keep=True), asked(loaded, monkeypatch)
    first = [teacher.outputs(tokens[indices], indices) for indices in ([0, 1], [2, 3], [4, 5])]
    again, others = teacher.outputs(tokens[[4, 1]], [4, 1])
    assert batches == [2, 2, 2]
    assert torch.equal(again, torch.stack([first[2][0][0], first[0][0][1]]))
    for place, block in enumerate(others):
        assert torch.equal(block, torch.stack([first[2][1][place][0], first[0][1][place][1]]))
    assert (teacher.head is None) == (behind is not None)


def test_a_teacher_that_cannot_keep_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: OnDisk, *_: object) -> None:
        raise OSError(28, "No space left on device")

    loaded, tokens = load_model(tiny_text.llama()), torch.randint(3, tiny_text.VOCABULARY, (4, 8))
    monkeypatch.setattr(kept, "MEMORY", 0.0)
    for method in ("put", "get"):
        teacher = Teacher(loaded, BLOCKS, 4, keep=True)
        with monkeypatch.context() as patch:
            patch.setattr(OnDisk, method, broken)
            outputs = [teacher.outputs(tokens, range(4)) for _ in range(3)]
        assert all(torch.equal(output, outputs[0][0]) for output, _ in outputs)
        assert teacher.kept is None and not teacher.keep


def test_blocks_in_bfloat16_are_kept_in_it() -> None:
    loaded, tokens = load_model(tiny_text.llama()), torch.randint(3, tiny_text.VOCABULARY, (4, 8))
    teacher = Teacher(loaded, BLOCKS, 4, True, lambda: torch.autocast("cpu", torch.bfloat16))
    (output, blocks), (again, others) = (teacher.outputs(tokens, range(4)) for _ in range(2))
    assert torch.equal(output, again) and all(map(torch.equal, blocks, others))
    assert {block.dtype for block in blocks} == {torch.bfloat16}
