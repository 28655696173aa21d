"""GaLore's memory and ranks."""
