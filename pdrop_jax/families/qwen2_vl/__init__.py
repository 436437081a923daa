"""Qwen2-VL and Qwen2.5-VL: pictures of any size as grids of patches, M-RoPE."""
