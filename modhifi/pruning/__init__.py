"""From moments to a smaller model: fidelity, selection, allocation, compensation."""
