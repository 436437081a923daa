"""PyramidDrop for LLaVA in JAX."""
