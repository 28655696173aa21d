"""Whether a task is hard enough to tell methods apart."""
