"""Change a model in the middle of a fit: full, joint, low-rank."""
