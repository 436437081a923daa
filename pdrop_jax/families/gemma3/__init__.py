"""Gemma 3: SigLIP with pooled features, windows in most layers, pictures that see themselves both ways."""
