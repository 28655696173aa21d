"""Merging now and then on a slow network: loss over bytes and over time, with every side tuned alike."""
