"""What a run writes: weights, manifest, card, report, exports."""
