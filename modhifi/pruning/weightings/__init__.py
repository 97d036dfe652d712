"""How the local errors of different groups are compared: one file a weighting."""

from __future__ import annotations

from modhifi.pruning.weightings.base import WEIGHTINGS as WEIGHTINGS
from modhifi.pruning.weightings.base import Weighting as Weighting

WEIGHTINGS.discover(__name__)
