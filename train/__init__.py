"""Training: recipes, data pipeline, optimizer steps and resumable checkpoints."""
