"""The precision of a distillation: the device's own, the one that is asked for, or the one that the process has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized

from modhifi.errors import ModhifiError
from modhifi.healing.devices import accelerator_for

CPU = torch.device("cpu")


@pytest.fixture
def others() -> Iterator[Accelerator]:
    """The accelerator of somebody's own training, in the same process."""
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state()


@pytest.mark.parametrize("has", [True, False])
def test_runs_of_a_process_have_each_their_own(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modhifi.healing.devices.has_bfloat16", lambda device: has)
    for precision, expected in (("auto", "bf16" if has else "no"), ("no", "no"), ("bf16", "bf16")):
        with accelerator_for(CPU, precision) as accelerator:
            assert accelerator.mixed_precision == expected
    assert not is_initialized()


def test_somebodys_own_accelerator_stays_and_decides(others: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modhifi.healing.devices.has_bfloat16", lambda device: True)
    with accelerator_for(CPU, "auto") as accelerator:
        assert accelerator.mixed_precision == "no"
    with pytest.raises(ModhifiError, match="set up otherwise"), accelerator_for(CPU, "bf16"):
        pass
    assert is_initialized() and others.mixed_precision == "no"
