"""Answers: load a checkpoint, generate, chat."""
