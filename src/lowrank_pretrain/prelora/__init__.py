"""Run PreLoRA: train in full, detect partial convergence, finish low-rank."""
