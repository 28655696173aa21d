"""Hold what every room stands on: errors, targets, plans, seeds, agreement between ranks."""
