"""PreLoRA on a Vision Transformer."""
