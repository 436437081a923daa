"""Recorded vectors of the PyTorch code, replayed."""
