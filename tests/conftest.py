"""Settings of all tests."""

import hypothesis
import jax

# The tolerances are those of float32: accelerators multiply float32 with fewer bits unless told otherwise.
jax.config.update("jax_platforms", "cpu")

hypothesis.settings.register_profile("pdrop", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("pdrop")
