"""Where a converted model comes from, in a file beside it, and the model card that tells it."""

import importlib.metadata
import json
import pathlib
from typing import Any

from pdrop_jax import checkpoint
from pdrop_jax.convert.hub import Location
from pdrop_jax.convert.sources import Source
