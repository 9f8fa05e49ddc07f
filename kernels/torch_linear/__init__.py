"""Linear attention in plain PyTorch, for any device: one operator in stages."""
