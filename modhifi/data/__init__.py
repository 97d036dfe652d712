"""Calibration and held-out samples: where they come from, and what they are worth."""
