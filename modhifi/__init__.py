"""Edit open-weight models with forward passes only: prune, unlearn, verify."""
