"""Numerical parity: replays vectors recorded from the official PyTorch code."""
