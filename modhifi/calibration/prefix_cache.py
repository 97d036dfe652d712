"""Run a model over the same batches again and again, each time from the first module on that may have changed.

What runs before is computed once for each batch and given from memory afterwards: probing changes one group at a time,
unlearning edits the same operators in several passes, sequential pruning moves on from reader to reader, and a block
stream from block to block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from modhifi.calibration.memory import loaded_once
from modhifi.calibration.timeline import Prefix, Timeline
from modhifi.data.samples import Samples
from modhifi.models.hooks import StopForward, attached, standing_in
from modhifi.models.loaded import LoadedModel
from modhifi.structure.torch_ops import tensors_in
from modhifi.structure.tracing.branches import Calls

# What is remembered of all batches together takes at most this many bytes.
MOST_BYTES = 2**30


@dataclass(frozen=True)
class Remembered:
    """The outputs of a prefix on one batch, whole where anything else reads them and otherwise their shapes alone."""

    prefix: Prefix
    outputs: dict[str, Any]

    @cached_property
    def nbytes(self) -> int:
        """Bytes that the outputs take."""
        return sum(tensor.nbytes for name in self.prefix.read for tensor in tensors_in(self.outputs[name]))


NOTHING = Remembered(Prefix({}, frozenset()), {})


class PrefixCache:
    """Runs ``model`` by ``run(batch)`` and remembers, batch by batch, what comes before the first change.

    ``timeline`` is that of the model or of one that it is a copy of; ``among`` names the modules whose outputs may be
    remembered, None for all. Outputs are kept on the device ``home``, None for where they are, and come back to that of
    the model. Batches for which they would exceed ``most_bytes`` in all run from the last point that is remembered.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Tensor], Any],
        timeline: Timeline,
        *,
        among: Collection[str] | None = None,
        home: torch.device | None = None,
        most_bytes: float = MOST_BYTES,
    ) -> None:
        self.model, self._run, self.timeline = model, run, timeline
        self.among, self.home, self.most_bytes = among, home, most_bytes
        self.device = None if home is None else next(model.parameters()).device
        self.prefix = NOTHING.prefix
        self.remembered: dict[int, Remembered] = {}

    def advance(self, changed: Iterable[str]) -> None:
        """Say that only the ``changed`` modules, and what runs behind the first of them, may differ from now on.

        What was remembered stays valid, so none of them may begin before those of the last call.
        """
        self.prefix = self.timeline.before(changed, self.among)

    def of(self, model: nn.Module, run: Callable[[Tensor], object]) -> PrefixCache:
        """The same for another copy of the model, which is the same before the change: they remember together."""
        other = copy(self)
        other.model, other._run = model, run
        return other

    @torch.no_grad()
    def run(self, key: int, batch: Tensor, calls: Calls | None = None) -> Any:
        """One pass on the batch with the number ``key``, the same batch for the same number.

        Give the active ``calls``, where there are any: their numbers go on behind what is not run. What comes before
        the change is remembered even where the pass ends early, if it came as far.
        """
        return self._pass(key, batch, calls)

    @torch.no_grad()
    def fill(self, key: int, batch: Tensor) -> None:
        """Remember what comes before the change, by a pass that ends there, unless that is known."""
        if self.remembered.get(key, NOTHING).prefix != self.prefix:
            with suppress(StopForward):
                self._pass(key, batch, None, stop=True)

    def _pass(self, key: int, batch: Tensor, calls: Calls | None, stop: bool = False) -> Any:
        before = self.remembered.get(key, NOTHING)
        if before.prefix == self.prefix:
            with self._given(before, calls):
                return self._run(batch)
        outputs: dict[str, Any] = {}
        try:
            with self._given(before, calls), self._recording(before, outputs, stop):
                return self._run(batch)
        finally:
            if outputs.keys() == self.prefix.calls.keys():  # not where a pass ended before
                self._remember(key, Remembered(self.prefix, outputs))

    def _remember(self, key: int, new: Remembered) -> None:
        others = sum(remembered.nbytes for other, remembered in self.remembered.items() if other != key)
        if others + new.nbytes <= self.most_bytes:
            self.remembered[key] = new

    def _given(self, before: Remembered, calls: Calls | None) -> AbstractContextManager[None]:
        """Inside, modules give what they gave before, copied lest later operations work in place."""

        def forward(name: str, *args: Any, **kwargs: Any) -> Any:
            if calls is not None:
                calls.time += before.prefix.calls[name]
            output = before.outputs[name]
            return _each(output, partial(_copy, device=self.device)) if name in before.prefix.read else output

        return standing_in({self.model.get_submodule(n): partial(forward, n) for n in before.prefix.calls})

    @contextmanager
    def _recording(self, before: Remembered, outputs: dict[str, Any], stop: bool) -> Iterator[None]:
        """Puts into ``outputs`` those of the prefix; with ``stop`` the pass ends with the last of them."""
        copy, shape = partial(_copy, device=self.home), partial(_shape, device=self.device)
        read, known = self.prefix.read, self.prefix.calls.keys() & before.prefix.calls.keys()
        for name in known:
            spent = name in before.prefix.read - read
            outputs[name] = _each(before.outputs[name], shape) if spent else before.outputs[name]

        def end(name: str, output: Any) -> None:
            outputs[name] = _each(output, copy if name in read else shape)
            if stop and len(outputs) == len(self.prefix.calls):
                raise StopForward

        new = [(name, self.model.get_submodule(name)) for name in self.prefix.calls if name not in known]
        # Before any hook that ends the pass.
        hooks = [
            module.register_forward_hook(lambda _, args, output, name=name: end(name, output), prepend=True)
            for name, module in new
        ]
        with attached(hooks):
            yield


class Passes:
    """Forward passes of ``model`` over ``samples``, each time from the operators in ``changed`` on.

    Only ``changed`` and what runs behind may be edited meanwhile. With none, nothing is remembered.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        model: nn.Module,
        samples: Samples,
        batch_size: int,
        changed: Sequence[str] = (),
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.loaded, self.model, self.batch_size = loaded, model, batch_size
        self.samples = loaded_once(samples) if changed else samples
        self._run = partial(loaded.logits, model=model)
        self.cache: PrefixCache | None = None
        if changed:
            timeline = Timeline(model, lambda: self._run(loaded.example))
            self.cache = PrefixCache(model, self._run, timeline, most_bytes=most_bytes)
            self.cache.advance(changed)

    def of(self, model: nn.Module) -> Passes:
        """The passes of another copy of the model, the same but for ``changed`` and what runs behind.

        What comes before runs once for both.
        """
        other = copy(self)
        other.model, other._run = model, partial(self.loaded.logits, model=model)
        other.cache = None if self.cache is None else self.cache.of(model, other._run)
        return other

    def __iter__(self) -> Iterator[tuple[int, Callable[..., Tensor]]]:
        """For every batch the number of its first sample and a function that runs the model on it.

        Give that function the active :class:`Calls`, where there is one: its numbers go on behind what is not run.
        """
        first = 0
        for batch in self.samples.batches(self.batch_size):
            yield first, partial(self._logits, first, batch)
            first += len(batch)

    @torch.no_grad()
    def _logits(self, first: int, batch: Tensor, calls: Calls | None = None) -> Tensor:
        logits: Tensor = self._run(batch) if self.cache is None else self.cache.run(first, batch, calls)
        return logits


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with ``change`` of every tensor, which no mode sees."""
    with torch._C.DisableTorchFunction():
        return tree_map(lambda v: change(v.detach() if v.requires_grad else v) if isinstance(v, Tensor) else v, value)


def _copy(tensor: Tensor, device: torch.device | None) -> Tensor:
    return tensor.clone() if device is None else tensor.to(device, copy=True)


def _shape(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A tensor of this shape that takes no memory."""
    return _zero(tensor.dtype, device or tensor.device).expand(tensor.shape)


@lru_cache(maxsize=16)
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)
