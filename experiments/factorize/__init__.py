"""Factored weights next to adapters and full training."""
