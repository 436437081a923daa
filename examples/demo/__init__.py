"""The demo task: grids of Fashion-MNIST photos, questions about them, and a small LLaVA that learns to answer."""
