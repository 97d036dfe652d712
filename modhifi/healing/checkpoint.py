"""The state of an unfinished distillation in one file, replaced in one step, from which the same run goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modhifi.errors import ModhifiError


@dataclass(frozen=True)
class Checkpoint:
    """A file ``path`` of the run that ``key`` names: its recipe, models and data; ``force`` forgets another run's."""

    path: Path
    key: str
    force: bool = False

    def read(self) -> dict[str, Any] | None:
        """The state of the run, None where it has not begun; raises ModhifiError for the state of another run."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception:  # whatever is in a file, and a file may hold anything
            if self.force:
                return None
            raise ModhifiError(
                f"{self.path} is no state of a run, or broken; remove it to begin anew, or give --force"
            ) from None
        if not isinstance(state, dict) or state.get("key") != self.key:
            if self.force:
                return None
            raise ModhifiError(
                f"{self.path} is the state of a run with other models, data or settings; run that one again to go on "
                "with it, or remove the file, or give --force"
            )
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces the state in one step; raises ModhifiError where there is no room."""
        part = self.path.with_name(f"{self.path.name}.part")
        try:
            torch.save({**state, "key": self.key}, part)
            os.replace(part, self.path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or "the disk is full or cannot be written"
            raise ModhifiError(f"cannot write {self.path}: {reason}; check space and permissions") from error

    def remove(self) -> None:
        """Removes the file, once the run is finished."""
        self.path.unlink(missing_ok=True)
