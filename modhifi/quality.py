"""How good calibration data is, told without labels: what the network remembers, what it predicts, what Grams hold."""

from __future__ import annotations
