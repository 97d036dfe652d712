"""The matrices of torch's recurrent layers (`nn.LSTM`, `nn.GRU`, `nn.RNN`) as operators of their own.

Such an operator has the name of its parameter (``lstm.weight_hh_l0``). It reads a sequence that no hook sees, the
hidden states of every step, which a pass of the layers below computes anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError

OPERATIONS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


@dataclass(frozen=True)
class Direction:
    """One direction of one layer: its number among all, and how its parameters' names end."""

    layer: int
    reverse: bool
    number: int

    @property
    def suffix(self) -> str:
        return f"_l{self.layer}" + "_reverse" * self.reverse


def directions(owner: nn.RNNBase) -> Iterator[Direction]:
    """Every direction of every layer, in torch's order."""
    count = 2 if owner.bidirectional else 1
    for layer in range(owner.num_layers):
        for side in range(count):
            yield Direction(layer, bool(side), layer * count + side)


def gate_count(owner: nn.RNNBase) -> int:
    """How many rows of the layer's matrices belong to one hidden unit."""
    return {"LSTM": 4, "GRU": 3}.get(owner.mode, 1)


class Gates(nn.Module):
    """A view of one matrix of the recurrent layer ``owner``: those of all gates, one below the other.

    It is no part of the model and is never called; ``weight`` and ``bias`` are the model's own parameters.
    """

    def __init__(self, owner: nn.RNNBase, leaf: str) -> None:
        super().__init__()
        self.place = (owner, leaf)  # in a tuple: no submodule
        self.weight: nn.Parameter = getattr(owner, leaf)
        self.bias: nn.Parameter | None = getattr(owner, leaf.replace("weight", "bias"), None)
        self.out_features, self.in_features = self.weight.shape

    def cut(self, inputs: Tensor, outputs: Tensor) -> None:
        """Keep the columns and rows that stay, bool each, in place; the biases are parameters of their own."""
        owner, leaf = self.place
        # Numbers of rows and columns: a mask has no known size on the meta device.
        rows, columns = (stays.nonzero().flatten().to(self.weight.device) for stays in (outputs, inputs))
        value = self.weight.data.index_select(0, rows).index_select(1, columns)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=self.weight.requires_grad))

    @torch.no_grad()
    def rows(self, x: Tensor, state: Any = None) -> Tensor:
        """What the matrix reads ``(batch, steps, columns)`` when its layer gets ``x`` and an initial state."""
        owner, leaf = self.place
        with torch._C.DisableTorchFunction():
            return _rows(owner, leaf, x, state)


def _rows(owner: nn.RNNBase, leaf: str, x: Tensor, state: Any) -> Tensor:
    if x.ndim != 3:
        raise ModhifiError("a recurrent layer is measured on batches of sequences of one length; give those")
    x = x if owner.batch_first else x.transpose(0, 1)
    own = next(d for d in directions(owner) if leaf.endswith(d.suffix))
    for layer in range(own.layer):
        x = torch.cat([_run(owner, d, x, state) for d in directions(owner) if d.layer == layer], 2)
    if leaf.startswith("weight_ih"):
        return x
    first = _initial(owner, own, x, state)
    if leaf.startswith("weight_hr"):
        return _before_projection(owner, own, x, first)
    hidden = _run(owner, own, x, state)
    start = first[0].transpose(0, 1)
    return torch.cat([hidden[:, 1:], start], 1) if own.reverse else torch.cat([start, hidden[:, :-1]], 1)


def _initial(owner: nn.RNNBase, own: Direction, x: Tensor, state: Any) -> tuple[Tensor, ...]:
    """The initial states of one direction, ``(1, batch, width)`` each: hidden and, of an LSTM, cell states."""
    widths = (owner.proj_size or owner.hidden_size, *([owner.hidden_size] if owner.mode == "LSTM" else []))
    if state is None:
        return tuple(x.new_zeros(1, len(x), width) for width in widths)
    states = state if isinstance(state, tuple) else (state,)
    return tuple(s[own.number : own.number + 1].to(x.dtype) for s in states)


def _run(owner: nn.RNNBase, own: Direction, x: Tensor, state: Any) -> Tensor:
    """The hidden states of one direction, ``(batch, steps, width)``, in the order of the sequence."""
    weights = [w for name in owner._flat_weights_names if name.endswith(own.suffix) for w in [getattr(owner, name)]]
    first = _initial(owner, own, x, state)
    given = first if owner.mode == "LSTM" else first[0]
    x = x.flip(1) if own.reverse else x
    out: Tensor = OPERATIONS[owner.mode](x, given, weights, owner.bias, 1, 0.0, False, False, True)[0]
    return out.flip(1) if own.reverse else out


def _before_projection(owner: nn.RNNBase, own: Direction, x: Tensor, first: tuple[Tensor, ...]) -> Tensor:
    """The hidden states of an LSTM before its projection, a step after the other."""
    w_ih, w_hh, w_hr = (getattr(owner, f"weight_{part}{own.suffix}") for part in ("ih", "hh", "hr"))
    bias: Any = sum(getattr(owner, f"bias_{part}{own.suffix}") for part in ("ih", "hh")) if owner.bias else 0.0
    hidden, cell = first[0][0], first[1][0]
    states = []
    for step in (x.flip(1) if own.reverse else x).unbind(1):
        i, f, g, o = (step @ w_ih.T + hidden @ w_hh.T + bias).chunk(4, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        states.append(o.sigmoid() * cell.tanh())
        hidden = states[-1] @ w_hr.T
    out = torch.stack(states, 1)
    return out.flip(1) if own.reverse else out


def order_of(owner: nn.RNNBase, own: Direction) -> Tensor:
    """The hidden units of one direction by how much reads them inside the layer, the most read one first.

    Every direction of every layer must have as many units, so those of equal rank go together.
    """
    read: Tensor = getattr(owner, f"weight_hh{own.suffix}").detach().double().square().sum(0)
    for other in directions(owner):
        if other.layer == own.layer + 1:
            columns = getattr(owner, f"weight_ih{other.suffix}").detach().double().square().sum(0)
            read = read + columns.chunk(2 if owner.bidirectional else 1)[int(own.reverse)]
    return read.argsort(descending=True, stable=True)
