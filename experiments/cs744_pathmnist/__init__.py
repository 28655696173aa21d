"""LoRA fine-tuning for PathMNIST."""
