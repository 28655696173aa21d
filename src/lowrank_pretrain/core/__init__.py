"""Provide what every room builds on: errors, targets, plans, seeds, agreement between ranks."""
