"""The processes of one run, as `accelerate launch -m modhifi` starts them: each measures its share of the data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import distributed

from modhifi.calibration.moments import Moments
from modhifi.errors import ModhifiError


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. ``device`` is its own accelerator; None: as without other processes."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def main(self) -> bool:
        """Whether this process goes on, writes and prints; the others measure and stop."""
        return self.index == 0


ALONE = Processes()


def launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes() -> Processes:
    """Join the other processes of this run, if a launcher started several.

    Raises ModhifiError where they cannot be joined: alone, each would do and write the whole.
    """
    if not launched():
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise ModhifiError(
            f"{os.environ['WORLD_SIZE']} processes were started and cannot be joined on {state.device}; "
            "start one, without a launcher"
        )
    return Processes(state.process_index, state.num_processes, state.device)


def merged(moments: Mapping[str, Moments], team: Processes) -> dict[str, Moments]:
    """Moments over the shares of all processes, exact up to rounding; every process gets them.

    Raises ModhifiError, in every process, where one of them has not seen all readers.
    """
    if team.count == 1:
        return dict(moments)
    names: list[list[str]] = [[] for _ in range(team.count)]
    distributed.all_gather_object(names, sorted(moments))
    if any(other != names[0] for other in names):
        partial = sorted(set().union(*names) - set(names[0]).intersection(*names))
        raise ModhifiError(f"the layer '{partial[0]}' was not run in every process; use fewer processes")
    return {name: _merged(moments[name], team) for name in names[0]}


def _merged(own: Moments, team: Processes) -> Moments:
    """The moments of the union: every share's covariance, and how far its mean lies from the common one."""
    device = own.mean.device
    common = device if team.device is None else team.device
    count = torch.tensor(float(own.n), dtype=torch.float64, device=common)
    distributed.all_reduce(count)
    share, mean = own.n / count, own.mean.to(common)
    middle = mean * share
    distributed.all_reduce(middle)
    gap = mean - middle
    cov = (own.cov.to(common) + gap[:, :, None] * gap[:, None, :]) * share
    distributed.all_reduce(cov)
    return Moments(int(count), middle.to(device), cov.to(device))
