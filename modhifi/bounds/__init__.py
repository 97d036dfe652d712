"""How far two models can differ: sound constants, propagation, confidence, verdicts."""
