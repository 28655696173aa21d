"""LightningModules around timm and transformers models."""
