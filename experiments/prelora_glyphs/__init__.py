"""PreLoRA at width 384."""
