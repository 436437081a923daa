"""SmolVLM2 and Idefics3: SigLIP on tiles of a picture with texts between them, merged patches, a Llama decoder."""
