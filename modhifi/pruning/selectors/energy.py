"""The energy score: how much of its readers' output energy a component explains alone."""

from __future__ import annotations

from modhifi.pruning.fidelity import energy_score
from modhifi.pruning.selectors.base import SELECTORS, Selector, lowest_first

SELECTORS.register(
    Selector(
        "energy",
        "the least output energy explained alone, Σ_c E‖Y_c‖² s_ci",
        "ours, on the singleton fidelity of arXiv 2511.19566",
        lowest_first(energy_score),
    )
)
