"""Re-estimated BatchNorm statistics are kept where they bring the model closer to the original, and only there."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from modhifi.data.in_memory import samples_from
from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.runs.recalibrate import reestimate_if_closer


def world() -> tuple[LoadedModel, Samples]:
    """A network whose remembered statistics are those of its samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5))
    images = torch.randn(40, 3, 6, 6) + 0.3
    model[1].momentum = None
    model(images)
    loaded = load_model(model.eval(), example=images[:2])
    return loaded, samples_from(images, loaded, n=40, seed=0)


@pytest.mark.parametrize("shift, kept", [(3.0, False), (0.0, True)])
def test_statistics_that_agree_better_are_kept(shift: float, kept: bool) -> None:
    loaded, samples = world()
    edited = copy.deepcopy(loaded.model)
    edited[1].running_mean += shift  # what an edit left wrong, or nothing
    before = copy.deepcopy(edited[1].state_dict())
    text = reestimate_if_closer(edited, loaded, samples, 8)
    assert ("stay as they were" in text) == kept
    same = torch.equal(edited[1].running_mean, before["running_mean"])
    assert same == kept
    if not kept:
        torch.testing.assert_close(edited[1].running_mean, loaded.model[1].running_mean, rtol=1e-3, atol=1e-3)
    assert not edited.training


def test_synthetic_samples_tell_no_statistics() -> None:
    loaded, samples = world()
    edited = copy.deepcopy(loaded.model)
    edited[1].running_mean += 3
    text = reestimate_if_closer(edited, loaded, replace(samples, synthetic=True), 8)
    assert "keeps" in text and torch.equal(edited[1].running_mean, loaded.model[1].running_mean + 3)
