"""PreLoRA: train in full, notice partial convergence, finish low-rank."""
