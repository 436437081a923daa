"""An HTTP server in OpenAI's form, on top of ``generation.continuous.Engine``."""
