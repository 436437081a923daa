"""Compile programs for TPU slices without a TPU, and report memory and communication."""
