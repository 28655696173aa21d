"""Log a run: CSV and W&B."""
