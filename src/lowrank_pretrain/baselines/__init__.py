"""Compare with other optimizers: Muon, SinkGD, 8-bit AdamW. Each is one object with a plain ``state_dict``."""
