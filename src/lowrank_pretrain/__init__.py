"""Pre-training large models with low-rank updates, as PyTorch Lightning plugins."""
