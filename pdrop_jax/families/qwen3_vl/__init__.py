"""Qwen3-VL: the tower of ``qwen2_vl`` with learned positions and DeepStack, timestamps in front of frames."""
