"""A distillation: it learns, repeats itself bit for bit, goes on where it was ended, and survives what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import tiny_timm
import torch
from torch import Tensor, nn

from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.healing.blocks import Cut, Watch
from modhifi.healing.checkpoint import Checkpoint
from modhifi.healing.devices import accelerator_for
from modhifi.healing.distil import Distillation, distil
from modhifi.healing.healed import Healed
from modhifi.healing.losses import block_loss, output_loss
from modhifi.healing.optimizers import OPTIMIZERS
from modhifi.healing.settings import HealSettings
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.progress import silent
from modhifi.structure.clone import clone

SETTINGS = HealSettings(learning_rate=1e-3, batch_size=8, steps=20)


def samples(inputs: Tensor) -> Samples:
    return replace(tiny_timm.samples_of(inputs, torch.zeros(len(inputs), dtype=torch.long)), labels=None)


@pytest.fixture(scope="module")
def pair() -> tuple[LoadedModel, nn.Module]:
    """A tiny conv net whose BatchNorms know the images, and itself with its weights disturbed."""
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.Conv2d(i, 6, 3), nn.BatchNorm2d(6), nn.ReLU()) for i in (3, 6)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    for _ in range(20):
        model(torch.randn(16, 3, 12, 12))
    loaded = load_model(model.eval(), example=torch.randn(2, 3, 12, 12))
    student = clone(loaded.model)
    for parameter in student.parameters():
        parameter.data += 0.3 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    return loaded, student


@pytest.fixture(scope="module")
def images() -> tuple[Samples, Samples]:
    torch.manual_seed(2)
    return samples(torch.randn(36, 3, 12, 12)), samples(torch.randn(16, 3, 12, 12))


def heal(pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples], **more: Any) -> Healed:
    settings = replace(SETTINGS, **{k: more.pop(k) for k in [*more] if hasattr(SETTINGS, k)})
    return distil(*pair, *images, settings, **more)


@contextmanager
def distillation(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples], settings: HealSettings
) -> Iterator[Distillation]:
    with accelerator_for(torch.device("cpu"), settings.precision) as accelerator:
        yield Distillation(accelerator, *pair, *images, settings, (), Cut(), None, silent, lambda text: None)


def same(first: nn.Module, second: nn.Module) -> bool:
    state = second.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize(
    "more",
    [
        *({"optimizer": name, "learning_rate": max(kind.rate, 1e-3)} for name, kind in OPTIMIZERS.items()),
        {"augment": True},
        {"batch_statistics": True},
        {"blocks": 0.0, "temperature": 4.0},
    ],
)
def test_the_student_comes_nearer_and_the_given_models_stay(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples], more: dict[str, Any]
) -> None:
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (pair[0].model, pair[1])]
    healed = heal(pair, images, steps=40, **more)
    assert healed.curve[-1]["divergence"] < 0.7 * healed.curve[0]["divergence"]
    assert healed.best > 0 and healed.broken is None
    assert not healed.model.training and not any(p.requires_grad for p in healed.model.parameters())
    for model, state in zip((pair[0].model, pair[1]), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_loss_has_the_distance_of_blocks_on_the_scale_of_the_divergence(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples]
) -> None:
    settings = replace(SETTINGS, temperature=3.0, blocks=0.5, precision="no")
    with distillation(pair, images, settings) as run:
        batch, names = next(images[0].batches(4)), tuple(run.blocks)
        with Watch(run.model, names) as run.watch, Watch(pair[0].model, names) as dense:
            loss = run._loss(range(4), 0)
            outputs = [pair[0].logits(batch, model) for model in (None, run.model)]
            expected = output_loss(*outputs, temperature=3.0) + 0.5 * 9 * block_loss(dense.take(), run.watch.take())
    assert names and loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_statistics_of_batchnorm_move_only_where_that_is_asked_for(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples]
) -> None:
    def statistics(model: nn.Module) -> list[Tensor]:
        return [m.running_mean for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    kept, moved = (statistics(heal(pair, images, batch_statistics=follow).model) for follow in (False, True))
    assert all(map(torch.equal, kept, statistics(pair[1])))
    assert not any(map(torch.equal, moved, statistics(pair[1])))


def test_what_the_teacher_said_is_kept_or_asked_again_with_the_same_result(
    pair: tuple[LoadedModel, nn.Module],
    images: tuple[Samples, Samples],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked, real = list[None](), LoadedModel.logits

    def logits(loaded: LoadedModel, batch: Tensor, model: nn.Module | None = None) -> Tensor:
        asked.extend([None] * (model is None))
        return real(loaded, batch, model)

    monkeypatch.setattr(LoadedModel, "logits", logits)
    monkeypatch.setenv("MODHIFI_CACHE", str(tmp_path))
    runs, calls = [], []
    for place in ("in memory", "MEMORY", "DISK"):
        if place != "in memory":
            monkeypatch.setattr(f"modhifi.healing.kept.{place}", 0.0)
        asked.clear()
        runs.append(heal(pair, images).model.state_dict())
        calls.append(len(asked))
    for again in runs[1:]:
        # Batches of other items round otherwise.
        for name, tensor in runs[0].items():
            torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-4)
    assert calls[0] == calls[1] < 20 < calls[2]


class Killed(BaseException):
    """The end of a process, which nothing in it notices."""


@pytest.mark.parametrize("at", [1, 6, 11])
def test_a_run_that_was_ended_goes_on_to_the_same_result(
    pair: tuple[LoadedModel, nn.Module],
    images: tuple[Samples, Samples],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    whole = heal(pair, images, augment=True, steps=12)
    checkpoint, real = Checkpoint(tmp_path / "out.healing", "this run"), Distillation._step

    def step(run: Distillation, share: float) -> None:
        if run.state.step == at:
            raise Killed
        real(run, share)

    monkeypatch.setattr(Distillation, "_step", step)
    with pytest.raises(Killed):
        heal(pair, images, augment=True, steps=12, checkpoint=checkpoint)
    monkeypatch.setattr(Distillation, "_step", real)
    lines: list[str] = []
    rest = heal(pair, images, augment=True, steps=12, checkpoint=checkpoint, note=lines.append)
    assert lines[0] == f"going on from step {at}"
    assert same(rest.model, whole.model) and rest.best == whole.best
    assert [e["divergence"] for e in rest.curve] == [e["divergence"] for e in whole.curve]


def test_the_state_of_another_run_is_refused(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples], tmp_path: Path
) -> None:
    path = tmp_path / "out.healing"
    heal(pair, images, steps=1, checkpoint=Checkpoint(path, "one"))
    with pytest.raises(ModhifiError, match="the state of a run with other models, data or settings"):
        heal(pair, images, steps=1, checkpoint=Checkpoint(path, "another"))
    assert heal(pair, images, steps=1, checkpoint=Checkpoint(path, "another", force=True)).steps == 1
    path.write_bytes(b"PK nothing")
    with pytest.raises(ModhifiError, match="broken; remove it"):
        heal(pair, images, steps=1, checkpoint=Checkpoint(path, "another"))


def test_a_full_disk_is_one_line(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples], tmp_path: Path
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no device that is full")
    (tmp_path / "out.healing.part").symlink_to(full)
    with pytest.raises(ModhifiError, match=r"cannot write .*out.healing: .*; check space"):
        heal(pair, images, steps=1, checkpoint=Checkpoint(tmp_path / "out.healing", "run"))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_run_with_the_weights_before(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Distillation._loss

    def loss(run: Distillation, indices: list[int], number: int) -> Tensor:
        return real(run, indices, number) * (torch.nan if run.state.step == 5 else 1)

    monkeypatch.setattr(Distillation, "_loss", loss)
    healed = heal(pair, images)
    assert (healed.broken, healed.steps, healed.best) == (6, 6, 5)
    assert all(tensor.isfinite().all() for tensor in healed.model.state_dict().values())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("could not create a primitive")]
)
def test_a_batch_that_does_not_fit_is_taken_in_parts_of_the_same_gradient(
    error: Exception,
    pair: tuple[LoadedModel, nn.Module],
    images: tuple[Samples, Samples],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, held = heal(pair, images, steps=3), list[Tensor | None]()
    real = Distillation._loss

    def loss(run: Distillation, indices: list[int], number: int) -> Tensor:
        held.append(run.watch.outputs.get("of a pass that failed"))
        value = real(run, indices, number)
        if len(indices) > 3:
            run.watch.outputs = {"of a pass that failed": value}
            raise error
        return value

    monkeypatch.setattr(Distillation, "_loss", loss)
    parts = heal(pair, images, steps=3)
    assert parts.notes == (
        "out of memory: 4 items at once from step 0 on",
        "out of memory: 2 items at once from step 0 on",
    )
    assert parts.curve[-1]["divergence"] == pytest.approx(whole.curve[-1]["divergence"], rel=1e-3)
    assert not any(tensor is not None for tensor in held), "its memory is what the smaller parts need"


def test_memory_that_is_too_small_for_one_item_is_said(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*_: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(Distillation, "_loss", loss)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        heal(pair, images)


def test_a_run_ends_early_where_it_gets_no_better(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples]
) -> None:
    same_model = (pair[0], pair[0].model)
    healed = heal(same_model, images, learning_rate=0.08, steps=200)
    # ten intervals of ten steps, counted from where it began anew: rounding decides whether it does
    begun = max((int(note.split("from step ")[1].split()[0]) for note in healed.notes), default=0)
    assert healed.early and healed.best == 0 and healed.steps == begun + 100
    assert same(healed.model, pair[0].model)


def test_minutes_end_a_run(pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples]) -> None:
    healed = heal(pair, images, steps=None, minutes=0.01)
    assert healed.steps > 0 and healed.curve[-1]["seconds"] >= 0.6


@pytest.fixture(scope="module")
def texts() -> Samples:
    torch.manual_seed(0)
    items = [torch.randint(3, tiny_text.VOCABULARY, (length,)) for length in (12, 12, 9, 12, 7, 8, 9, 9)]
    names = tuple(map(str, range(8)))
    return Samples(items.__getitem__, names, None, names, "random", False)


def disturbed(dtype: torch.dtype) -> tuple[LoadedModel, nn.Module]:
    """A tiny language model, and itself with its weights disturbed."""
    loaded = load_model(tiny_text.llama().to(dtype))
    torch.manual_seed(0)
    student = clone(loaded.model)
    for parameter in student.parameters():
        parameter.data += (0.2 * parameter.float().std().nan_to_num() * torch.randn(parameter.shape)).to(dtype)
    return loaded, student


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_of_embeddings_stays_and_so_does_a_head_that_shares_it(
    tied: bool, optimizer: str, texts: Samples
) -> None:
    loaded = load_model(tiny_text.llama(tie_word_embeddings=tied))
    student = clone(loaded.model)
    for name, parameter in student.named_parameters():
        parameter.data *= 1 if "embed" in name else 1.1
    healed = distil(loaded, student, texts, texts, replace(SETTINGS, learning_rate=3e-3, optimizer=optimizer))
    after, changed = healed.model.state_dict(), {"lm_head.weight"} if not tied else set()
    stayed = {name for name, tensor in student.state_dict().items() if torch.equal(tensor, after[name])}
    assert stayed == {"model.embed_tokens.weight", "lm_head.weight"} - changed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_language_model_in_half_precision_learns_and_stays_in_it(dtype: torch.dtype, texts: Samples) -> None:
    healed = distil(*disturbed(dtype), texts, texts, replace(SETTINGS, learning_rate=3e-3, batch_size=4))
    assert healed.curve[-1]["divergence"] < 0.8 * healed.curve[0]["divergence"]
    assert {p.dtype for p in healed.model.parameters()} == {dtype}
    assert healed.blocks == ("model.layers.0", "model.layers.1")


def test_a_teacher_in_another_type_is_learnt_from(texts: Samples) -> None:
    loaded, student = disturbed(torch.float32)
    half = replace(loaded, model=clone(loaded.model).to(torch.bfloat16))
    healed = distil(half, student, texts, texts, replace(SETTINGS, learning_rate=3e-3))
    assert healed.curve[-1]["divergence"] < 0.8 * healed.curve[0]["divergence"]
    assert {p.dtype for p in healed.model.parameters()} == {torch.float32}


def test_adapters_are_merged_into_weights_of_the_same_names(texts: Samples, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    loaded, student = disturbed(torch.float32)
    settings = replace(SETTINGS, learning_rate=3e-3, lora=2)
    healed = distil(loaded, student, texts, texts, settings, checkpoint=Checkpoint(tmp_path / "x.healing", "run"))
    assert healed.curve[-1]["divergence"] < 0.95 * healed.curve[0]["divergence"]
    before, after = student.state_dict(), healed.model.state_dict()
    assert list(before) == list(after) and type(healed.model) is type(student)
    changed = {
        name.rpartition(".")[0].rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])
    }
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    weights = torch.load(tmp_path / "x.healing", weights_only=True)["weights"]
    assert all("lora" in name for name in weights)


def test_the_teacher_runs_in_the_precision_of_the_student(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples]
) -> None:
    with distillation(pair, images, replace(SETTINGS, precision="bf16")) as run:
        # what is examined is examined in full
        assert run.examination.teacher.autocast is nullcontext
        output, _ = run.teacher.outputs(next(images[0].batches(4)), range(4))
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_with_batchnorm_of_any_type_is_healed_in_bfloat16(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples], dtype: torch.dtype
) -> None:
    other = replace(pair[0], model=clone(pair[0].model).to(dtype)), clone(pair[1]).to(dtype)
    other[1].register_buffer("mask", torch.ones(2, dtype=torch.bool))  # no half of anything
    healed = heal(other, images, steps=40, precision="bf16")
    assert healed.curve[-1]["divergence"] < 0.7 * healed.curve[0]["divergence"]
    state = healed.model.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype for name, tensor in other[1].state_dict().items()
    }
    assert torch.isfinite(other[0].logits(next(images[1].batches(4)), healed.model)).all()


def test_a_learning_rate_that_only_harms_is_made_smaller_and_statistics_stay(
    pair: tuple[LoadedModel, nn.Module], images: tuple[Samples, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        Distillation, "_normalise_by_batch", lambda self, active: steps.append((self.state.step, active))
    )
    near = heal(pair, images, steps=200).model
    steps.clear()
    healed = heal((pair[0], near), images, steps=40, optimizer="sgd", learning_rate=10.0, batch_statistics=True)
    backed_off = [note for note in healed.notes if "only got worse" in note]
    assert backed_off and "learning rate 2.5" in backed_off[0] and "from step 4 on" in backed_off[0]
    assert {step for step, active in steps if active} == {0, 1, 2, 3}
    # the weights are those that it came with again: the loss is that of the beginning, not of where it went astray
    assert healed.curve[3]["divergence"] < healed.curve[2]["divergence"]
    assert not [note for note in heal(pair, images, steps=40).notes if "only got worse" in note]
