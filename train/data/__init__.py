"""Conversations and images as batches."""
