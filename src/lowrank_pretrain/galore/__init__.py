"""GaLore: full weights, projected gradients."""
