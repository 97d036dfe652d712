"""R4: the change of the output that each modified layer causes, measured with hybrid networks.

Hybrid k has the first k modified layers undone. Neighbours differ in one layer, fed with clean activations and followed
by the modified tail (form B), and the differences telescope exactly to the whole change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modhifi.structure.clone import clone
from modhifi.structure.torch_ops import names_of, operation_name, tensors_in

# Operations whose results are kept; none of them writes into its input.
COSTLY = names_of("conv", "transposed conv", "linear", "matrix product", "attention", "batch norm", "norm") | {"einsum"}


@dataclass(frozen=True)
class LayerShare:
    """The part of the output's change that one modified layer causes: root mean squares over the samples.

    ``local`` is e_k, in units of the layer's output; ``change`` is t_k, in units of the network's; ``amplification`` is
    t_k / e_k and ``constant`` the global bound of that ratio (R1). ``where`` names the layer, ``parameters`` are those
    that the edit changed there.
    """

    where: str
    parameters: tuple[str, ...]
    local: float
    change: float
    amplification: float
    constant: float


@torch.no_grad()
def hybrid_changes(
    original: nn.Module,
    edited: nn.Module,
    layers: Sequence[tuple[str, ...]],
    run: Callable[[Tensor, nn.Module], Tensor],
    parts: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Measures the change (n, ...) of the output that each modified layer causes, in one pass a layer.

    ``layers`` hold the names of their parameters, in order of execution.
    ``parts`` are the batches that make up the n samples. Returns the changes, the outputs of the network with every
    layer undone and those of the modified network; the changes add up to the difference of the two. Both models have
    the same shapes and stay as they are.
    """
    hybrid = clone(edited)
    original_tensors, edited_tensors, hybrid_tensors = _tensors(original), _tensors(edited), _tensors(hybrid)
    modified = {name for name, tensor in original_tensors.items() if not torch.equal(tensor, edited_tensors[name])}
    outputs = []
    for part in parts:
        clean = CleanPass()
        with clean:
            run(part, original)
        # A tensor that no operation was seen to read, inside compiled code for instance, might be read anywhere.
        hidden = not {id(original_tensors[name]) for name in modified} <= clean.read
        hybrids = []
        for k in range(len(layers) + 1):
            for name in layers[k - 1] if k else ():
                hybrid_tensors[name].data.copy_(original_tensors[name])
            later = {id(hybrid_tensors[name]) for name in modified.difference(*layers[:k])}
            # The last hybrid is run in full: it shows that undoing the edit gives back the original.
            with clean.until_read(None if hidden or k == len(layers) else later):
                hybrids.append(run(part, hybrid))
        outputs.append(torch.stack(hybrids))
        for name in modified:
            hybrid_tensors[name].data.copy_(edited_tensors[name])
    steps = torch.cat(outputs, 1)
    return list(steps.diff(dim=0)), steps[-1], steps[0]


class CleanPass(TorchFunctionMode):
    """The results of the costly operations of a pass of the original, in their order, and the tensors that it read.

    A hybrid computes the same until it first reads a tensor that is still modified: up to there its results are taken
    from here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []
        self.read: set[int] = set()
        self.modified: set[int] | None = None
        self.number = 0
        self.clean = True

    @contextmanager
    def until_read(self, modified: set[int] | None) -> Iterator[None]:
        """Takes results from the recorded pass until one of these tensors is read, by ``id``; with None, never."""
        self.modified, self.number, self.clean = modified, 0, True
        with self if modified is not None else nullcontext():
            yield

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {id(t) for t in tensors_in((args, kwargs))}
        costly = operation_name(func) in COSTLY
        if self.modified is None:
            out = func(*args, **kwargs)
            self.read |= inputs
            if costly:
                self.results.append(out.clone())
            return out
        self.clean = self.clean and not inputs & self.modified
        if not self.clean or not costly:
            return func(*args, **kwargs)
        self.number += 1
        # What follows may write into it.
        return self.results[self.number - 1].clone()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
