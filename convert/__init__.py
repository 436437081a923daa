"""Conversion between PyTorch LLaVA checkpoints and ours (installed as ``pdrop_jax.convert``)."""
