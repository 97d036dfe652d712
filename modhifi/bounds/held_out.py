"""One pass of two models over held-out samples: the table behind every measured and every statistical figure.

A unit is an image or a whole sequence, never a token. Padding counts for nothing. Source: docs/method.md, R3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.bounds.constant_predictor import Constant, OriginalOutputs, rows_at_once, single
from modhifi.data.samples import Samples
from modhifi.errors import GateFailed, ModhifiError
from modhifi.models.loaded import PADDING, LoadedModel, real_tokens
from modhifi.models.trial import broken_layer
from modhifi.structure.outputs import around_mean, classes_last

Logits = Callable[[Tensor], Tensor]
"""One forward pass, from a batch to logits ``(batch, ..., classes)``: ``partial(loaded.logits, model=edited)``, say."""

# The largest mean loss, in nats, whose exp is taken: beyond it exp overflows.
MOST_NATS = 700.0


@dataclass(frozen=True)
class HeldOut:
    """The outputs of the original and the edited model compared on each of n held-out units.

    Columns are float64 ``(n,)`` on the CPU, means over a unit's positions (the tokens of a sequence; an image has one).
    Divergences are in nats, between the softmax of the original and that of the edited model.
    """

    agreement: Tensor  # share of positions with the same top-1
    squared_error: Tensor  # ‖original − edited‖²
    energy: Tensor  # ‖original‖²
    kl: Tensor  # KL(original ‖ edited)
    total_variation: Tensor  # in [0, 1]
    positions: Tensor  # int64
    constant: Constant
    # Seconds an item of both models, a pair a batch; the first batch is left out, which warms up.
    seconds: tuple[tuple[float, float], ...]
    # The largest logit's class, int64 (n,), of models with one output a unit.
    top_before: Tensor | None = None
    top_after: Tensor | None = None
    # Mean negative log-likelihood of the next tokens, of causal language models; NaN for a unit of one token.
    nll_before: Tensor | None = None
    nll_after: Tensor | None = None
    # Of values: the sum of a unit's rows of the original, float64 (n, width), and of their squared norms.
    sums: Tensor | None = None
    squares: Tensor | None = None

    def __len__(self) -> int:
        return len(self.agreement)

    def subset(self, units: Sequence[int]) -> HeldOut:
        """The table of some units, by their numbers; what is said of all of them together stays."""
        columns: dict[str, Any] = {
            field.name: column[list(units)]
            for field in fields(self)
            if isinstance(column := getattr(self, field.name), Tensor)
        }
        return replace(self, **columns)

    @property
    def sequences(self) -> bool:
        """Whether units have several positions."""
        return int(self.positions.max()) > 1

    @property
    def flips(self) -> Tensor:
        """The share of a unit's positions whose top-1 changed: 0 or 1 for an image."""
        return 1 - self.agreement

    @property
    def error(self) -> Tensor:
        """The Euclidean norm of the change of a unit's whole output."""
        return (self.squared_error * self.positions).sqrt()

    @property
    def nll_growth(self) -> Tensor | None:
        """The growth of each sequence's mean negative log-likelihood of its next tokens, in nats, float64 ``(m,)``.

        Units without a next token are left out; None where none has one.
        """
        if self.nll_before is None or self.nll_after is None:
            return None
        growth = self.nll_after - self.nll_before
        growth = growth[~growth.isnan()]
        return growth if len(growth) else None

    @property
    def relative_error(self) -> float:
        """E‖original − edited‖² / E‖original‖²: 0 for equal outputs, 1 for an edited model that outputs zeros."""
        energy = float(self.energy.sum())
        return float(self.squared_error.sum()) / energy if energy else math.nan

    @property
    def spread(self) -> float:
        """Of values the root mean squared distance of a unit's whole output from the mean one; 0 where none varies."""
        if self.sums is None or self.squares is None:
            return 0.0
        around = around_mean(float(self.squares.sum()), self.sums.sum(0), int(self.positions.sum()))
        return math.sqrt(around / len(self))

    @property
    def explained(self) -> float | None:
        """R²: of values the share of the original's variance that is kept; None where they do not vary."""
        return 1 - float(self.error.square().mean()) / self.spread**2 if self.spread else None

    def perplexities(self) -> tuple[float, float]:
        """The perplexities of both models: exp of the mean loss, in nats, of every token that has one before it.

        Raises ModhifiError if no token has one before it.
        """
        before, after = (_perplexity(nll, self.positions) for nll in (self.nll_before, self.nll_after))
        return before, after

    def accuracies(self, labels: Tensor) -> tuple[float, float]:
        """The share of units whose largest logit is that of their label, int64 ``(n,)``, of both models."""
        assert self.top_before is not None and self.top_after is not None
        before, after = (float((top == labels).double().mean()) for top in (self.top_before, self.top_after))
        return before, after

    def summary(self) -> dict[str, Any]:
        """The means over the units, ready for JSON."""
        size = {"mean_squared_error": float(self.squared_error.mean()), "relative_error": self.relative_error}
        if self.sums is not None:
            return {"n": len(self), **size, "explained": self.explained}
        return {
            "n": len(self),
            "agreement": float(self.agreement.mean()),
            **size,
            "kl": float(self.kl.mean()),
            "total_variation": float(self.total_variation.mean()),
        }


@torch.inference_mode()
def run_held_out(
    original: Logits,
    edited: Sequence[Logits],
    held: Samples,
    batch_size: int = 32,
    *,
    tokens: bool = False,
    next_tokens: bool = False,
    values: bool = False,
    models: tuple[nn.Module, ...] = (),
) -> list[HeldOut]:
    """Runs a model and several edited ones on every sample once and tabulates the outputs of each beside its own.

    ``tokens``: the samples are token ids, padded or not; ``next_tokens``: the outputs are causal logits besides;
    ``values``: they are no scores of classes. Raises
    ModhifiError if there is no sample or an output of the original is not finite, GateFailed if one of an edited model
    is not; it names the first layer to blame among those of ``models``.
    """
    before, rows = _Timed(original), [_Rows(_Timed(logits)) for logits in edited]
    outputs, counts, sums = OriginalOutputs(), list[Tensor](), list[Tensor]()
    for batch in held.batches(batch_size):
        start = sum(map(len, counts))
        names = held.names[start : start + len(batch)]
        logits_before = classes_last(before(batch))
        _check_finite(logits_before, names, ModhifiError, "original", models, partial(original, batch))
        if logits_before.device.type == "mps":
            logits_before = logits_before.cpu()  # it has no float64
        real, targets = _positions(batch, logits_before, tokens or next_tokens, next_tokens)
        for each in rows:
            logits_after = classes_last(each.run(batch))
            _check_finite(logits_after, names, GateFailed, "modified", models, partial(each.run.logits, batch))
            each.add(logits_before, logits_after.to(logits_before.device), real, targets)
        counts.append(real.sum(1).cpu())
        if values:
            sums.append(_sums(logits_before, real).cpu())
        outputs.add(logits_before, real, targets)
    if not counts:
        raise ModhifiError("there is no held-out sample; give at least one")
    tables = [each.table(torch.cat(counts), outputs, before.seconds, next_tokens) for each in rows]
    if not values:
        return tables
    total = torch.cat(sums)
    return [replace(table, sums=total[:, :-1], squares=total[:, -1]) for table in tables]


def tabulate(original: LoadedModel, edited: nn.Module, held: Samples, batch_size: int) -> HeldOut:
    """Runs a model and its edited version on held-out samples, each on its device; raises as :func:`run_held_out`."""
    (table,) = tabulate_several(original, [edited], held, batch_size)
    return table


def tabulate_several(
    original: LoadedModel, edited: Sequence[nn.Module], held: Samples, batch_size: int
) -> list[HeldOut]:
    """The tables of several edited versions of a model, which itself runs once; raises as :func:`run_held_out`."""
    return run_held_out(
        original.logits,
        [partial(original.logits, model=model) for model in edited],
        held,
        batch_size,
        tokens=original.reads_tokens,
        next_tokens=original.kind == "text",
        values=original.gives_values,
        models=(original.model, *edited),
    )


def tabulate_outputs(
    original: Tensor, edited: Tensor, held: Samples, batch_size: int, models: tuple[nn.Module, ...] = ()
) -> HeldOut:
    """The table of outputs ``(n, classes)`` that are known already; raises as :func:`run_held_out`."""
    known = (
        partial(lambda batches, _: next(batches), iter(outputs.split(batch_size))) for outputs in (original, edited)
    )
    before, after = known
    (table,) = run_held_out(before, [after], held, batch_size, models=models)
    return table


class _Rows:
    """The rows of one edited model's table, batch by batch."""

    def __init__(self, run: _Timed) -> None:
        self.run = run
        self.columns: list[Tensor] = []
        self.tops: list[Tensor] = []

    def add(self, before: Tensor, after: Tensor, real: Tensor, targets: Tensor) -> None:
        if before.shape != after.shape:
            raise ModhifiError(f"outputs of shape {tuple(before.shape)} and {tuple(after.shape)} cannot be compared")
        self.columns.append(_columns(before, after, real, targets).cpu())
        if before.ndim == 2:
            self.tops.append(torch.stack([before.argmax(-1), after.argmax(-1)], 1).cpu())

    def table(self, counts: Tensor, outputs: OriginalOutputs, seconds: Sequence[float], next_tokens: bool) -> HeldOut:
        agreement, squared, energy, kl, variation, nll_before, nll_after = torch.cat(self.columns).unbind(1)
        top_before, top_after = torch.cat(self.tops).unbind(1) if self.tops else (None, None)
        return HeldOut(
            agreement,
            squared,
            energy,
            kl,
            variation,
            counts,
            outputs.constant(nll_before),
            tuple(zip(seconds[1:], self.run.seconds[1:], strict=True)),
            top_before,
            top_after,
            nll_before if next_tokens else None,
            nll_after if next_tokens else None,
        )


class _Timed:
    """A forward pass whose wall-clock time is taken, in seconds an item."""

    def __init__(self, logits: Logits) -> None:
        self.logits = logits
        self.seconds: list[float] = []

    def __call__(self, batch: Tensor) -> Tensor:
        start = time.perf_counter()
        outputs = self.logits(batch)
        if outputs.is_cuda:
            torch.cuda.synchronize(outputs.device)
        self.seconds.append((time.perf_counter() - start) / len(batch))
        return outputs


def _positions(batch: Tensor, outputs: Tensor, tokens: bool, next_tokens: bool) -> tuple[Tensor, Tensor]:
    """Which positions are real, bool (b, p), and the token that follows each, int64 (b, p): PADDING where none does."""
    shape = (len(outputs), math.prod(outputs.shape[1:-1]))
    device = outputs.device
    real = real_tokens(batch) if tokens else None
    real = torch.ones(shape, dtype=torch.bool) if real is None or tuple(real.shape) != shape else real
    targets = torch.full(shape, PADDING)
    if next_tokens and tuple(batch.shape) == shape:
        targets[:, :-1] = batch[:, 1:]
    return real.to(device), targets.to(device)


def _sums(outputs: Tensor, real: Tensor) -> Tensor:
    """The sum of each unit's real rows, and that of their squared norms behind it, float64 (b, width + 1)."""
    rows = outputs.double().reshape(*real.shape, -1) * real[:, :, None]
    return torch.cat([rows.sum(1), rows.square().sum((1, 2))[:, None]], 1)


def _columns(original: Tensor, edited: Tensor, real: Tensor, targets: Tensor) -> Tensor:
    """The seven columns of a batch, float64 (b, 7): means over the real positions.

    The two losses are means over the positions that have a next token.
    """
    classes, size = original.shape[-1], rows_at_once(original.shape[-1])
    flat = (original.reshape(-1, classes), edited.reshape(-1, classes), targets.reshape(-1))
    values = torch.cat([_compare(*rows) for rows in zip(*(t.split(size) for t in flat), strict=True)]).reshape(
        *real.shape, 7
    )
    share = real.double()[:, :, None]
    has_next = (targets != PADDING).double()[:, :, None]
    means = (values[..., :5] * share).sum(1) / share.sum(1)
    losses = (values[..., 5:] * has_next).sum(1) / has_next.sum(1)
    return torch.cat([means, losses], 1)


def _compare(original: Tensor, edited: Tensor, targets: Tensor) -> Tensor:
    """The seven columns position by position, float64 (rows, 7), from logits (rows, classes).

    Logits are compared in their own precision, single at least, and summed in double.
    """
    agree = original.argmax(-1) == edited.argmax(-1)
    original, edited = single(original), single(edited)
    log_p, log_q = original.log_softmax(-1), edited.log_softmax(-1)
    p = log_p.exp()
    total = partial(torch.sum, dim=-1, dtype=torch.float64)
    kl = total(p * (log_p - log_q)).clamp_min(0)
    variation = (total((p - log_q.exp()).abs()) / 2).clamp(0, 1)
    next_token = targets.clamp(min=0)[:, None]
    losses = [-log.gather(-1, next_token)[:, 0].double() for log in (log_p, log_q)]
    squares = (total((original - edited).square()), total(original.square()))
    return torch.stack([agree.double(), *squares, kl, variation, *losses], -1)


def _perplexity(nll: Tensor | None, positions: Tensor) -> float:
    counts = positions - 1
    if nll is None or not bool((counts > 0).any()):
        raise ModhifiError("perplexity needs windows of at least two tokens; give a longer text")
    loss = float((nll.nan_to_num(0) * counts).sum() / counts.sum())
    return math.exp(min(loss, MOST_NATS))


def _check_finite(
    outputs: Tensor,
    names: tuple[str, ...],
    error: type[ModhifiError],
    which: str,
    models: tuple[nn.Module, ...],
    run: Callable[[], object],
) -> None:
    finite = outputs.isfinite().flatten(1).all(1)
    if bool(finite.all()):
        return
    name, layer = names[int((~finite).nonzero()[0])], broken_layer(models, run)
    first = "" if layer is None else f", first {layer}"
    advice = "give the model in bfloat16 or float32" if outputs.dtype == torch.float16 else "check its weights"
    raise error(f"the {which} model's output is not finite on '{name}'{first}; it cannot be bounded; {advice}")
