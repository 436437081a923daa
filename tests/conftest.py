"""Settings of all tests."""

import hypothesis

hypothesis.settings.register_profile("pdrop", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("pdrop")
