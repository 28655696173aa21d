"""Which optimizer learns best at equal steps, seconds and bytes, when each is tuned alike."""
