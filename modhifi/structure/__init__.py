"""What can be removed from a network, and how it is cut. Knows ``nn.Module`` and no library of models."""
