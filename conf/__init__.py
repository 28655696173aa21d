"""Hydra configuration, shipped as `lowrank_pretrain.conf`."""
