"""Factor weights: in the middle of training, a layer's W becomes U·V, which shrinks memory, state and compute."""
