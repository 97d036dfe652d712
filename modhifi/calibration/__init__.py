"""What forward passes tell: the moments of each reader's input."""
