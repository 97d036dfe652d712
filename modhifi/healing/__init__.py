"""From a smaller model back towards the original: distillation, the one place where gradients reach weights."""
