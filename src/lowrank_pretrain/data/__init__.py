"""LightningDataModules: images and text."""
