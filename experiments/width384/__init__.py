"""LTE's observations, multi-head LoRA on GPT-2 and the composition of all methods, at width 384."""
