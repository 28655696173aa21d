"""LTE on Vision Transformers and MLP-Mixers."""
