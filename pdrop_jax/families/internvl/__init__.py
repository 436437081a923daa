"""InternVL3: InternViT on tiles of a picture and its thumbnail, merged patches, a Qwen2 decoder."""
