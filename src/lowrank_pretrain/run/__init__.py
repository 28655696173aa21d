"""Compose and train one run from its configuration."""
