"""InternVL3 and 3.5: InternViT on tiles of a picture and its thumbnail, merged patches, a Qwen2 or Qwen3 decoder."""
