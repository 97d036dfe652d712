"""Distil an original into its smaller version: no labels, the original's outputs are all there is to learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modhifi.calibration.memory import loaded_once
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError, is_out_of_memory
from modhifi.healing.augment import augmented
from modhifi.healing.blocks import Cut, Match, Watch, matched_blocks
from modhifi.healing.checkpoint import Checkpoint
from modhifi.healing.devices import accelerator_for
from modhifi.healing.examination import Examination
from modhifi.healing.healed import Healed, State, best_entry
from modhifi.healing.lora import add_adapters, merge
from modhifi.healing.losses import block_loss, output_loss
from modhifi.healing.optimizers import OPTIMIZERS
from modhifi.healing.schedule import Schedule, interval, learning_rate
from modhifi.healing.settings import HealSettings
from modhifi.healing.teacher import Teacher
from modhifi.models.half_precision import takes_bfloat16
from modhifi.models.hub import first_line
from modhifi.models.loaded import LoadedModel, frozen
from modhifi.progress import Progress, silent
from modhifi.structure.clone import clone

# The largest norm of a gradient; the intervals without a better student after which a run ends.
CLIP, PATIENCE = 1.0, 10
# A learning rate after so many intervals of which the student is only worse, and comes no nearer, is divided by this,
# down to this share: the first steps of an optimiser that scales its gradients do harm that the next ones mend.
HARM, SMALLER, LEAST_RATE = 2, 4.0, 1 / 16
# Small batches, which tell blocks with an output for each item from those that see some of the items.
TRIED = (5, 3, 2)


def distil(
    original: LoadedModel,
    student: nn.Module,
    train: Samples,
    validation: Samples,
    settings: HealSettings,
    *,
    closed: Sequence[int] = (),
    cut: Cut | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda text: None,
) -> Healed:
    """Trains a copy of ``student``, a smaller or edited version of ``original``, towards the outputs of the original.

    The given models stay as they are, and so do tables of embeddings and the heads that share them. ``validation``
    samples, on which nothing is trained, choose the best weights.
    ``closed`` classes are taken from the teacher, and no block is matched then: they were erased on purpose.
    ``cut`` says what the student lacks, None for nothing. With a ``checkpoint`` a run goes on where it was
    ended. Raises ModhifiError where the models cannot be run on the samples, in float32
    or with gradients.
    """
    with accelerator_for(next(original.model.parameters()).device, settings.precision) as accelerator:
        told = (checkpoint, progress, note)
        return Distillation(
            accelerator, original, student, train, validation, settings, closed, cut or Cut(), *told
        ).run()


class Distillation:
    """One distillation; see :func:`distil`. Every step is determined by the seed and its number alone."""

    def __init__(
        self,
        accelerator: Accelerator,
        original: LoadedModel,
        student: nn.Module,
        train: Samples,
        validation: Samples,
        settings: HealSettings,
        closed: Sequence[int],
        cut: Cut,
        checkpoint: Checkpoint | None,
        progress: Progress,
        note: Callable[[str], None],
    ) -> None:
        self.original, self.settings, self.closed = original, settings, tuple(closed)
        self.checkpoint = checkpoint
        self.progress, self.note = progress, note
        self.device = next(original.model.parameters()).device
        self.accelerator = accelerator
        self.dtypes = {name: tensor.dtype for name, tensor in _tensors(student).items()}
        self.model = clone(student)
        if any(d.is_floating_point and d.itemsize < torch.float32.itemsize for d in self.dtypes.values()):
            _require_runs(original, self.model.float())
        self.norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        matched = settings.blocks > 0 and not self.closed
        tried = (train.first(count) for count in TRIED)
        blocks = matched_blocks(original, student, cut, tried) if matched else dict[str, Match]()
        self.adapted = None
        if settings.lora is None:
            # Of a vocabulary the samples have a part; the rows of other tokens would learn noise.
            tables = {module.weight for module in self.model.modules() if isinstance(module, nn.Embedding)}
            for parameter in self.model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() and parameter not in tables)
        else:
            self.adapted = add_adapters(self.model, settings.lora, settings.seed)
        products = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        optimizer = OPTIMIZERS[settings.optimizer].make(self.model, settings.learning_rate, products)
        self.forward = vars(self.model).get("forward")
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.size = min(settings.batch_size, len(train))
        self.state = State(micro=self.size)
        self.schedule = Schedule(settings.steps, settings.minutes)
        keep = not settings.augment
        autocast = accelerator.autocast if takes_bfloat16(original.model) else nullcontext
        processes = self.accelerator.num_processes
        self.train = loaded_once(train, processes)
        self.teacher = Teacher(original, blocks, len(train), keep, autocast, processes)
        self.examination = Examination(original, validation, settings.batch_size, self.closed)
        self.best = self._weights()
        self.losses: list[Tensor] = []

    @property
    def blocks(self) -> Mapping[str, Match]:
        """The blocks that are compared."""
        return self.teacher.blocks

    def run(self) -> Healed:
        """Trains until the end, early or not."""
        self._resume()
        if not self.state.curve:
            if not self._look():
                raise ModhifiError("the model to heal has outputs that are not finite; check its weights")
            self._save()
        broken, early = None, False
        with ExitStack() as stack:
            self.watch = stack.enter_context(Watch(self.model, tuple(match.student for match in self.blocks.values())))
            share = self._share()
            while share < 1 and broken is None and not early:
                self._step(share)
                before, share = share, self._share()
                self._tell(share)
                if share < 1 and interval(share) == interval(before):
                    continue
                if not self._look():
                    broken = self.state.step
                elif len(self.state.curve) - 1 - max(self.state.since, best_entry(self.state.curve)) >= PATIENCE:
                    early = True
                else:
                    self._back_off()
                    self._save()
        return self._healed(broken, early)

    # -- one step ------------------------------------------------------------------------------------------------------
    def _step(self, share: float) -> None:
        """One step of the optimiser; a batch that does not fit into memory is taken in halves from then on."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.state.rate * learning_rate(share)
        indices = self._indices()
        # Statistics of batches alone can cost a student that is near the original more than a few steps bring.
        self._normalise_by_batch(self.settings.batch_statistics and self.state.rate == 1)
        while not self._accumulated(indices):
            self.state.micro = (self.state.micro + 1) // 2
            self._remark(f"out of memory: {self.state.micro} items at once from step {self.state.step} on")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self._normalise_by_batch(False)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), CLIP)
        self.optimizer.step()
        self.state.step += 1

    def _accumulated(self, indices: Sequence[int]) -> bool:
        """Adds up the gradients of a batch, part by part; whether they fitted into memory."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        parts = [indices[i : i + self.state.micro] for i in range(0, len(indices), self.state.micro)]
        try:
            for number, part in enumerate(parts):
                loss = self._loss(part, number) * (len(part) / len(indices))
                self.accelerator.backward(loss)
                total += loss.detach()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.state.micro == 1 or self.accelerator.num_processes > 1:
                raise
            self.watch.forget()
            return False
        self.losses.append(total)
        return True

    def _loss(self, indices: Sequence[int], number: int) -> Tensor:
        settings = self.settings
        batch = next(self.train.subset(indices).batches(len(indices)))
        if settings.augment:
            seed = hash((settings.seed, self.state.step, number, self.accelerator.process_index))
            batch = augmented(batch, torch.Generator().manual_seed(seed))
        if batch.ndim == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        wanted, wanted_blocks = self.teacher.outputs(batch, indices)
        real = self._real(batch)
        with self.accelerator.autocast():
            output = self.original.logits(batch, self.wrapped)
        if not output.requires_grad:
            raise ModhifiError(
                f"no gradient gets from the model's output ({output.dtype}) to its weights; wrap it to return scores "
                "that are computed with gradients"
            )
        loss = output_loss(
            wanted,
            output,
            real,
            temperature=settings.temperature,
            spread=self.examination.spread,
            closed=self.closed,
        )
        seen = self._seen(len(batch), wanted_blocks)
        if seen:
            # As the divergence is, which would outweigh them otherwise: gradients of soft outputs are small.
            softened = 1.0 if self.original.gives_values else settings.temperature**2
            loss = loss + settings.blocks * softened * block_loss([w for w, _ in seen], [s for _, s in seen], real)
        return loss

    def _seen(self, rows: int, wanted: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The outputs of the teacher's blocks beside the student's; a block whose rows are no items is dropped."""
        by_student = {match.student: block for match, block in zip(self.blocks.values(), wanted, strict=True)}
        self.watch.let_go(rows)
        seen = dict(zip(self.watch.modules, self.watch.take(), strict=True))
        self.teacher.drop([name for name, match in self.blocks.items() if match.student not in seen])
        return [(block, seen[name]) for name, block in by_student.items() if name in seen]

    def _indices(self) -> list[int]:
        """The samples of this step: a seeded permutation of all an epoch, dealt out to the processes."""
        epoch, place = divmod(self.state.step, len(self.train) // self.size)
        generator = torch.Generator().manual_seed(hash((self.settings.seed, epoch)))
        order = torch.randperm(len(self.train), generator=generator)
        batch = order[place * self.size : (place + 1) * self.size]
        return batch[self.accelerator.process_index :: self.accelerator.num_processes].tolist()

    def _normalise_by_batch(self, active: bool) -> None:
        for norm in self.norms:
            norm.training = active

    # -- every interval ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _look(self) -> bool:
        """Adds an entry to the curve and keeps the weights if they are the best; whether all figures are finite."""
        loss = None
        if self.losses:
            loss = float(self.accelerator.reduce(torch.stack(self.losses).mean(), "mean"))
        self.losses = []
        entry = {
            "step": self.state.step,
            "seconds": self.schedule.seconds,
            "loss": loss,
            **self.examination.figures(self.model),
        }
        if not all(value is None or torch.tensor(value).isfinite() for value in entry.values()):
            return False
        self.state.curve.append(entry)
        if best_entry(self.state.curve) == len(self.state.curve) - 1:
            self.best = self._weights()
        shown = "" if entry["agreement"] is None else f", agreement {100 * entry['agreement']:.2f} %"
        self.note(f"step {self.state.step}: divergence {entry['divergence']:.4g}{shown}")
        return True

    def _back_off(self) -> None:
        """Begins anew where the steps so far only take the student further away.

        The learning rate is smaller then, and BatchNorm keeps its statistics.
        """
        state = self.state
        distances = [entry["divergence"] for entry in state.curve[state.since + 1 :]]
        if len(distances) < HARM or best_entry(state.curve) != 0 or distances[-1] < distances[-2]:
            return
        if min(distances) <= state.curve[0]["divergence"]:
            return
        if state.rate <= LEAST_RATE:
            return
        state.rate, state.since = state.rate / SMALLER, len(state.curve) - 1
        self.model.load_state_dict(self.best, strict=False)
        self.optimizer.state.clear()
        rate = self.settings.learning_rate * state.rate
        kept = ", BatchNorm's statistics as they were" if self.settings.batch_statistics and self.norms else ""
        self._remark(f"the student only got worse: learning rate {rate:.2g}{kept} from step {state.step} on, and anew")

    def _tell(self, share: float) -> None:
        done = self.state.step
        self.progress("distilling", done, max(done, round(done / share)) if share else done + 1)

    def _share(self) -> float:
        share = self.schedule.share(self.state.step)
        if self.accelerator.num_processes == 1:
            return share
        # Clocks differ, and every process has to end at the same step.
        return float(broadcast(torch.tensor(share, dtype=torch.float64, device=self.device)))

    def _real(self, batch: Tensor) -> Tensor | None:
        real = self.original.real_tokens(batch)
        return None if real is None else real.to(self.device)

    def _remark(self, text: str) -> None:
        self.state.notes.append(text)
        self.note(text)

    # -- weights -------------------------------------------------------------------------------------------------------
    def _weights(self) -> dict[str, Tensor]:
        """The student's state as it is now, on the CPU; with adapters these alone."""
        wanted = {n for n, p in self.model.named_parameters() if p.requires_grad}
        state = self.model.state_dict()
        kept = state if self.adapted is None else {name: state[name] for name in wanted}
        return {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}

    def _save(self) -> None:
        if self.checkpoint is not None and self.accelerator.is_main_process:
            weights = {"weights": self._weights(), "best": self.best, "optimizer": self.optimizer.state_dict()}
            self.checkpoint.write({**weights, "seconds": self.schedule.seconds, **vars(self.state)})

    def _resume(self) -> None:
        state = None if self.checkpoint is None else self.checkpoint.read()
        if state is None:
            return
        self.model.load_state_dict(state["weights"], strict=False)
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.spent = state["seconds"]
        self.state = State(**{name: state[name] for name in vars(self.state) if name in state})
        self.note(f"going on from step {self.state.step}")

    def _healed(self, broken: int | None, early: bool) -> Healed:
        self.model.load_state_dict(self.best, strict=False)
        # Accelerate's own way back would also take the decorators off the forward of a model of transformers.
        for name in ("forward", "_original_forward"):
            vars(self.model).pop(name, None)
        if self.forward is not None:
            self.model.forward = self.forward
        model = self.model if self.adapted is None else merge(self.adapted)
        frozen(model)
        for name, tensor in _tensors(model).items():
            tensor.data = tensor.data.to(self.dtypes[name])
        return Healed(
            model,
            tuple(self.state.curve),
            self.state.step,
            self.schedule.seconds,
            self.state.curve[best_entry(self.state.curve)]["step"],
            broken,
            early,
            tuple(self.blocks),
            self.accelerator.mixed_precision,
            tuple(self.state.notes),
        )


@torch.no_grad()
def _require_runs(original: LoadedModel, model: nn.Module) -> None:
    """Raises ModhifiError where the code of a model makes numbers of half precision whatever its weights are."""
    try:
        original.logits(original.example, model)
    except Exception as error:
        raise ModhifiError(
            f"weights are trained in float32, and the model does not run in it ({first_line(error)}); have its code "
            "cast to the dtype of its weights"
        ) from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
