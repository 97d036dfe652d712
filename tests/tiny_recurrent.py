"""Small nets around torch's recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# kind, layers, both directions, projection, batch first, reads the last state
CASES: dict[str, tuple[type[nn.RNNBase], int, bool, int, bool, bool]] = {
    "lstm": (nn.LSTM, 1, False, 0, True, False),
    "lstm, deep, both ways": (nn.LSTM, 2, True, 0, True, True),
    "lstm, projected": (nn.LSTM, 2, True, 6, True, False),
    "lstm, projected, time first": (nn.LSTM, 1, False, 6, False, True),
    "gru, deep, time first": (nn.GRU, 2, False, 0, False, True),
    "gru, deep, both ways": (nn.GRU, 3, True, 0, True, False),
    "rnn, both ways": (nn.RNN, 1, True, 0, True, False),
}


class Recurrent(nn.Module):
    """A linear map, a recurrent layer of 10 units, and a head that reads every step or the last state."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind, layers, both, projected, self.batch_first, self.last = CASES[name]
        more: dict[str, Any] = {"proj_size": projected} if projected else {}
        self.inputs = nn.Linear(5, 7)
        self.rnn = kind(7, 10, layers, bidirectional=both, batch_first=self.batch_first, **more)
        self.head = nn.Linear((projected or 10) * (2 if both else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x).relu()
        out, state = self.rnn(x if self.batch_first else x.transpose(0, 1))
        if not self.last:
            return self.head(out if self.batch_first else out.transpose(0, 1))
        state = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([state[-2], state[-1]], 1) if self.rnn.bidirectional else state[-1])


class Copier(nn.Module):
    """A decoder that begins with the state of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(5, 8, 2, batch_first=True)
        self.decoder = nn.LSTM(5, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.encoder(x)
        return self.head(self.decoder(x, state)[0])


def recurrent(name: str) -> tuple[nn.Module, Tensor]:
    """A net in float64 and eval mode, and a batch of 3 sequences."""
    torch.manual_seed(0)
    net = (Copier() if name == "copier" else Recurrent(name)).double().eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.mul_(2)
    return net, torch.randn(3, 6, 5, dtype=torch.float64)
