"""Factored weights: a layer's W becomes U·V at a switch in the middle of training, and everything shrinks with it."""
