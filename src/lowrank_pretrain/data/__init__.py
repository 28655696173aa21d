"""Provide LightningDataModules over images and text whose loaders resume in the middle of an epoch, bit for bit."""

from pathlib import Path

SAMPLES = Path(__file__).parent / "samples"  # the embedded data; sources and licences: samples/PROVENANCE.md
