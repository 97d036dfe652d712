"""What a teacher said of samples, kept where it fits: in memory, else in a file that is gone with the process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from modhifi.cache import default_directory
from modhifi.calibration.memory import free_bytes

# The shares of the free memory, and of the free disk, that all processes of a run may take.
MEMORY, DISK = 0.25, 1 / 3
# Tensors of every dtype begin at multiples of so many bytes.
ALIGNED = 16


class Kept(Protocol):
    """Several tensors of every sample, each of one shape and dtype over all samples."""

    def put(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Keeps ``tensors`` ``(n, ...)`` of the samples at ``indices``; raises OSError where there is no room."""

    def get(self, indices: Sequence[int]) -> list[Tensor]:
        """The tensors ``(n, ...)`` of samples that were put, on the CPU; raises OSError where they cannot be read."""


def room_for(count: int, tensors: Sequence[Tensor], processes: int = 1) -> Kept | None:
    """Room for tensors like these, ``(n, ...)``, of ``count`` samples in every process; None if there is none.

    What a GPU puts out goes into memory alone: it is sooner computed than read from a disk.
    """
    needed = processes * count * sum(tensor[0].nbytes for tensor in tensors)
    if needed <= MEMORY * free_bytes(torch.device("cpu")):
        return InMemory(count, tensors)
    if tensors[0].device.type != "cpu":
        return None
    directory = default_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return OnDisk(directory, tensors) if needed <= DISK * shutil.disk_usage(directory).free else None
    except OSError:
        return None


class InMemory:
    """Tensors as rows of larger ones."""

    def __init__(self, count: int, like: Sequence[Tensor]) -> None:
        self.rows = [torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype) for tensor in like]

    def put(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> None:
        for rows, tensor in zip(self.rows, tensors, strict=True):
            rows[torch.tensor(indices)] = tensor.to(rows.device)

    def get(self, indices: Sequence[int]) -> list[Tensor]:
        return [rows[torch.tensor(indices)] for rows in self.rows]


class OnDisk:
    """Tensors in a file without a name, a record for every sample: none is left behind, whatever ends the process."""

    def __init__(self, directory: Path, like: Sequence[Tensor]) -> None:
        self.file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self.kinds = [(tensor.shape[1:], tensor.dtype, tensor[0].nbytes) for tensor in like]
        self.sizes = [-(-size // ALIGNED) * ALIGNED for _, _, size in self.kinds]

    def __del__(self) -> None:
        self.file.close()

    def put(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> None:
        records = torch.zeros(len(indices), sum(self.sizes), dtype=torch.uint8)
        for part, tensor in zip(records.split(self.sizes, 1), tensors, strict=True):
            bytes_of = tensor.contiguous().view(len(tensor), -1).view(torch.uint8)
            part[:, : bytes_of.shape[1]] = bytes_of
        for index, record in zip(indices, records, strict=True):
            self.file.seek(index * len(record))
            self.file.write(record.numpy())
        self.file.flush()

    def get(self, indices: Sequence[int]) -> list[Tensor]:
        records = torch.empty(len(indices), sum(self.sizes), dtype=torch.uint8)
        for index, record in zip(indices, records, strict=True):
            self.file.seek(index * len(record))
            if self.file.readinto(record.numpy()) != len(record):
                raise OSError("a record is cut off")
        return [
            part[:, :size].contiguous().view(dtype).view(len(indices), *shape)
            for part, (shape, dtype, size) in zip(records.split(self.sizes, 1), self.kinds, strict=True)
        ]
