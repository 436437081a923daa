"""Data pipeline: conversations and images to batches."""
