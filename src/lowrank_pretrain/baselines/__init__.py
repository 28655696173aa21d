"""Optimizers of others to compare with: Muon, SinkGD, 8-bit AdamW. Each is one object with a plain ``state_dict``."""
