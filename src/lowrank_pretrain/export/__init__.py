"""Write trained weights in the formats that stock libraries read: timm, transformers, peft."""

from lowrank_pretrain.export.weights import export, export_module, main

__all__ = ["export", "export_module", "main"]
