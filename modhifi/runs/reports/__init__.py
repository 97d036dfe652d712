"""What a run has to say: figures, bounds and the outcome, as parts of its report."""
