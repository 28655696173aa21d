"""LTE on GPT-2."""
