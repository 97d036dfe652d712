"""What a model costs and how far two models differ: every figure here is measured, none is estimated."""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modhifi.errors import ModhifiError
from modhifi.models.loaded import PADDING, real_tokens

if TYPE_CHECKING:
    from modhifi.data.samples import Samples

Logits = Callable[[Tensor], Tensor]
"""One forward pass, from a batch to logits ``(batch, ..., classes)``: ``partial(loaded.logits, model=edited)``, say."""

T = TypeVar("T")

# Rows of logits that are compared at once, times classes: bounds the float64 copies to some 100 MB.
CHUNK_ELEMENTS = 4_000_000
# A mean loss above this is a ruined model's, and its exp would overflow.
MOST_NATS = 700.0


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_flops(model: nn.Module, batch: Tensor) -> int:
    """Floating-point operations of one forward pass of the first item of ``batch``, by torch's FlopCounterMode.

    A multiply-add counts as two operations. Counted are matrix products, convolutions and attention (in full, also
    where a causal mask would allow to skip half of it); norms, activations and pooling are not.
    """
    # The CPU's fused attention has no formula in the counter and would count as nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch[:1].to(_device(model)))
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Latency:
    """The time of one forward pass of one model, and its ratio to the first model of the same comparison."""

    median: float  # seconds a batch
    iqr: float  # seconds, third quartile minus first
    ratio: float  # median over the rounds of this model's time by the first model's in the same round
    ratio_iqr: float
    rounds: int
    passes: int  # forward passes behind every round's time
    batch: int  # items in the batch
    threads: int
    device: str


def compare_latency(
    models: dict[str, nn.Module], batch: Tensor, *, rounds: int = 21, min_run_time: float = 0.05
) -> dict[str, Latency]:
    """Time the models on one batch, taking turns, so that a disturbance of the machine meets all of them alike.

    Every round times each model once, as the mean of as many passes as take about ``min_run_time`` seconds
    (``torch.utils.benchmark.Timer.blocked_autorange`` finds how many, and warms up). The order turns with the rounds.
    Uses torch's current number of threads. Raises ModhifiError unless all models are on one device.
    """
    devices = {_device(model) for model in models.values()}
    if len(devices) != 1:
        raise ModhifiError("latency can only be compared between models on one device; move them to the same one")
    batch = batch.to(device := devices.pop())
    threads = torch.get_num_threads()
    timer_class = _timer()
    timers = [
        timer_class("run(model, batch)", globals={"run": _run, "model": model, "batch": batch}, num_threads=threads)
        for model in models.values()
    ]
    passes = [timer.blocked_autorange(min_run_time=min_run_time).number_per_run for timer in timers]
    seconds: list[list[float]] = [[] for _ in timers]
    for turn in range(rounds):
        for offset in range(len(timers)):
            k = (turn + offset) % len(timers)
            seconds[k].append(timers[k].timeit(passes[k]).mean)
    result = {}
    for k, name in enumerate(models):
        median, iqr = _median_iqr(seconds[k])
        ratio, ratio_iqr = _median_iqr([own / first for own, first in zip(seconds[k], seconds[0], strict=True)])
        result[name] = Latency(median, iqr, ratio, ratio_iqr, rounds, passes[k], len(batch), threads, str(device))
    return result


def _timer() -> Any:
    """``torch.utils.benchmark.Timer``, without torch's complaint about a CUDA toolkit on a machine without a GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.benchmark import Timer
    finally:
        logger.setLevel(level)
    return Timer


@torch.inference_mode()
def _run(model: nn.Module, batch: Tensor) -> None:
    model(batch)


def _median_iqr(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], 0.0
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return median, third - first


def with_peak_memory(run: Callable[[], T], device: torch.device | str = "cpu") -> tuple[T, int]:
    """Call ``run`` and return its result and the peak of memory meanwhile, in bytes.

    On cuda: what torch allocated. Elsewhere: the resident memory of the whole process, libraries included; the peak of
    this call on Linux, where it can be reset, the peak since the process began on other systems.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device)
    _reset_peak_resident()
    return run(), _peak_resident()


def _reset_peak_resident() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak_resident() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        # Not at the top: Windows has no such module.
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@torch.inference_mode()
def accuracy(logits: Logits, samples: Samples, *, batch_size: int = 64, device: torch.device | str = "cpu") -> float:
    """The share of samples, in [0, 1], whose largest logit is that of their label.

    Raises ModhifiError if the samples have no labels or a logit is not finite.
    """
    if samples.labels is None:
        raise ModhifiError(f"accuracy needs labels and {samples.description!r} has none; use a folder per class")
    outputs = [_finite(logits(batch.to(device))).argmax(-1).cpu() for batch in samples.batches(batch_size)]
    return (torch.cat(outputs) == samples.labels).double().mean().item()


@dataclass(frozen=True)
class Comparison:
    """How the outputs of an edited model differ from the dense model's, item by item; tensors are float64 ``(n,)``.

    Logits with more axes than (item, class), a language model's, are averaged over the axes between, so that an item
    is one image or one window of text. Divergences are in nats, between softmax distributions.
    """

    agreement: Tensor  # share of positions with the same top-1
    squared_error: Tensor  # ‖dense − edited‖²
    energy: Tensor  # ‖dense‖²
    kl: Tensor  # KL(dense ‖ edited)
    total_variation: Tensor  # in [0, 1]

    @property
    def relative_error(self) -> float:
        """E‖dense − edited‖² / E‖dense‖²: 0 for equal outputs, 1 for an edited model that outputs zeros."""
        energy = self.energy.sum().item()
        return self.squared_error.sum().item() / energy if energy else math.nan

    def summary(self) -> dict[str, Any]:
        """The means over the items, ready for JSON."""
        return {
            "n": len(self.agreement),
            "agreement": self.agreement.mean().item(),
            "mean_squared_error": self.squared_error.mean().item(),
            "relative_error": self.relative_error,
            "kl": self.kl.mean().item(),
            "total_variation": self.total_variation.mean().item(),
        }


def compare(
    dense: Logits, edited: Logits, samples: Samples, *, batch_size: int = 64, device: torch.device | str = "cpu"
) -> Comparison:
    """Run both models on every sample, once, and compare their outputs.

    Raises ModhifiError if an output is not finite.
    """
    return _compare_batches(dense, edited, samples.batches(batch_size), device)


@torch.inference_mode()
def _compare_batches(dense: Logits, edited: Logits, batches: Any, device: torch.device | str) -> Comparison:
    parts = []
    for batch in batches:
        if len(batch) == 0:
            continue
        batch = batch.to(device)
        ours, theirs = _finite(dense(batch)), _finite(edited(batch))
        classes = ours.shape[-1]
        rows = max(1, CHUNK_ELEMENTS // classes)
        pairs = zip(ours.reshape(-1, classes).split(rows), theirs.reshape(-1, classes).split(rows), strict=True)
        columns = torch.cat([_compare_rows(first, second) for first, second in pairs])
        columns = columns.reshape(len(batch), -1, columns.shape[-1])
        real = real_tokens(batch)
        if real is not None and real.shape == columns.shape[:2]:
            share = real.double().cpu()[:, :, None]
            parts.append((columns * share).sum(1) / share.sum(1))
        else:
            parts.append(columns.mean(1))
    if not parts:
        raise ModhifiError("there are no samples to compare the models on; give at least one")
    return Comparison(*torch.cat(parts).unbind(1))


def _compare_rows(dense: Tensor, edited: Tensor) -> Tensor:
    """The five columns of a Comparison, float64 ``(rows, 5)`` on the CPU, from logits ``(rows, classes)``."""
    if dense.device.type == "mps":
        # It has no float64.
        dense, edited = dense.cpu(), edited.cpu()
    agree = dense.argmax(-1) == edited.argmax(-1)
    dense, edited = dense.double(), edited.double()
    log_p, log_q = dense.log_softmax(-1), edited.log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1).clamp_min(0)
    variation = (p - log_q.exp()).abs().sum(-1) / 2
    columns = (agree.double(), (dense - edited).square().sum(-1), dense.square().sum(-1), kl, variation)
    return torch.stack(columns, -1).cpu()


class NextTokens:
    """A causal language model's forward pass that also sums up the loss of every token that has one before it.

    Call it like the pass it wraps; padding (:data:`modhifi.models.loaded.PADDING`) counts for nothing.
    """

    def __init__(self, logits: Logits) -> None:
        self.logits = logits
        self.loss, self.count = 0.0, 0

    def __call__(self, batch: Tensor) -> Tensor:
        outputs = self.logits(batch)
        target = batch[:, 1:].to(outputs.device)
        # item by item, because the logits of a large vocabulary are a batch's largest tensor
        for rows, wanted in zip(outputs, target, strict=True):
            self.loss += nn.functional.cross_entropy(
                rows[:-1].float(), wanted, ignore_index=PADDING, reduction="sum"
            ).item()
        self.count += int((target != PADDING).sum())
        return outputs

    @property
    def perplexity(self) -> float:
        """exp of the mean loss in nats. Raises ModhifiError if no token had one before it."""
        if not self.count:
            raise ModhifiError("perplexity needs windows of at least two tokens; give a longer text")
        return math.exp(min(self.loss / self.count, MOST_NATS))


class Timed:
    """A forward pass that also takes the time. Call it like the pass it wraps."""

    def __init__(self, logits: Logits) -> None:
        self.logits = logits
        self.passes: list[tuple[int, float]] = []

    def __call__(self, batch: Tensor) -> Tensor:
        start = time.perf_counter()
        outputs = self.logits(batch)
        if outputs.is_cuda:
            torch.cuda.synchronize(outputs.device)
        self.passes.append((len(batch), time.perf_counter() - start))
        return outputs

    @property
    def per_second(self) -> float | None:
        """Items a second, the first pass left out, which warms up; None where there was no other."""
        items, seconds = (sum(column) for column in zip(*self.passes[1:], strict=True)) if self.passes[1:] else (0, 0)
        return items / seconds if seconds else None


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's state dict as it is written, shared tensors once."""
    seen = {(t.data_ptr(), t.dtype, tuple(t.shape)): t.nbytes for t in model.state_dict().values()}
    return sum(seen.values())


@torch.inference_mode()
def perplexity(logits: Logits, tokens: Tensor, *, batch_size: int = 4, device: torch.device | str = "cpu") -> float:
    """The perplexity of a causal language model on token windows, int64 ``(n, T)``, every window on its own.

    exp of the mean negative log-likelihood, in nats, of the tokens that have one before them.
    Raises ModhifiError if there is no such token or a logit is not finite.
    """
    scored = NextTokens(logits)
    for batch in tokens.split(batch_size) if tokens.numel() else ():
        _finite(scored(batch.to(device)))
    return scored.perplexity


def _finite(outputs: Tensor) -> Tensor:
    if not outputs.isfinite().all():
        raise ModhifiError("the model's outputs are not finite; check its weights, or give it in a wider type")
    return outputs


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
