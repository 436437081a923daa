"""The training application: recipes, data, steps, checkpoints that can be resumed."""
