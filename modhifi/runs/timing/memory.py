"""The memory that one forward pass needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from modhifi.models.hooks import attached
from modhifi.runs.measure import device_of, stored_bytes
from modhifi.runs.timing.runtimes.base import Run
from modhifi.structure.torch_ops import tensors_in


class _Alive(TorchDispatchMode):
    """What the results that are computed inside hold at once.

    ``peak`` is the largest number of bytes, ``instants`` has the bytes after every operation by ``writer``, the
    operator that ran last when they were computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.peak, self.writer = 0, ""
        self.instants: dict[frozenset[tuple[str, int]], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), self.writer
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        held: Counter[str] = Counter()
        for _, size, writer in self.storages.values():
            held[writer] += size
        self.peak = max(self.peak, held.total())
        self.instants[frozenset(held.items())] = None
        return out


@torch.no_grad()
def activation_bytes(run: Run) -> int:
    """The most bytes that the results of a pass of eager torch hold at once, without what kernels use inside."""
    with _Alive() as alive:
        run()
    return alive.peak


@torch.no_grad()
def bytes_by_writer(run: Run, operators: Mapping[str, nn.Module]) -> list[dict[str, int]]:
    """The bytes that the results of a pass hold at every instant, by the operator that ran last before they were made.

    The key of what was made before any operator ran is empty; an instant that is like another one is left out.
    """
    alive = _Alive()

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            alive.writer = name

        return hook

    with attached([m.register_forward_pre_hook(note(name)) for name, m in operators.items()]), alive:
        run()
    return [dict(instant) for instant in alive.instants]


def peak_bytes(model: nn.Module, run: Run, eager: bool) -> int | None:
    """The bytes of a model's weights and of the most that one pass holds beside them.

    On a GPU it is measured; on a CPU it is counted, of eager torch alone, and None for another runtime.
    """
    weights, device = stored_bytes(model), device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return weights + torch.cuda.max_memory_allocated(device) - before
    return weights + activation_bytes(run) if eager else None
