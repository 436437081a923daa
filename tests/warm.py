"""What a fork server imports: all that training and evaluation need, without torch. See ``command.Forked``."""

from command import WITHOUT_TORCH

exec(WITHOUT_TORCH)

import pdrop_jax.cli.eval  # noqa: E402
import pdrop_jax.cli.study  # noqa: E402
import pdrop_jax.cli.train  # noqa: E402
import pdrop_jax.cli.tune  # noqa: E402
import pdrop_jax.convert.cache  # noqa: E402
import pdrop_jax.train.loop  # noqa: E402
import pdrop_jax.train.processes  # noqa: E402, F401
