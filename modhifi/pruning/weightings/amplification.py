"""Each group's error counts by its measured effect on the model's output."""

from __future__ import annotations

from modhifi.pruning.sensitivity import TRIAL, probed_plan
from modhifi.pruning.weightings.base import WEIGHTINGS, Weighting

WEIGHTINGS.register(
    Weighting("amplification", "by its measured effect on the model's output", "ours", probed_plan, trial=TRIAL)
)
