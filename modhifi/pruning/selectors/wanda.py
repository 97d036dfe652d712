"""Structured Wanda: the energy of a component's contributions."""

from __future__ import annotations

from modhifi.pruning.fidelity import wanda_score
from modhifi.pruning.selectors.base import SELECTORS, Selector, lowest_first

SELECTORS.register(
    Selector(
        "wanda",
        "the least energy of its own contributions, Σ_c E‖A_ci‖²",
        "Sun et al. 2023 (arXiv 2306.11695), by components; arXiv 2511.19566 for the Cholesky form",
        lowest_first(wanda_score),
    ),
    "cholesky",
)
