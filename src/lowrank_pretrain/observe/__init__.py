"""Measure a run: throughput, memory, FLOPs, norms, ranks and spectra."""
