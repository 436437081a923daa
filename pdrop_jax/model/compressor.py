"""Early compression in the vision tower (LLaVA-UHD v4, arXiv 2605.08985): behind a layer k, 2 x 2 patches become one.

With X the output of layer k, and windows of 2 x 2 patches that neither overlap nor see each other::

    Y = X + WindowAttention(LN1(X))                  projections, heads and LN1 of layer k
    Z = PixelUnshuffle(Y)                            the four patches of a window, joined to 4D channels
    out = AveragePool(Y) + W2 act(W1 LN2(Z))         W1: 4D -> 4F, W2: 4F -> D

Every weight begins as one of layer k, see ``compression``. That the average is of Y and not of X is in the authors'
code, not in the paper.
"""

from collections.abc import Callable

import jax

from pdrop_jax.config import EarlyCompression
from pdrop_jax.model.compression import PATCHES
from pdrop_jax.model.layers import activate, layer_norm, linear
from pdrop_jax.model.specs import Params

NORM_EPS = 1e-6  # of "unshuffle", whatever the tower has


@jax.named_scope("compressor")
def compress(
    compression: EarlyCompression,
    params: Params,
    x: jax.Array,
    attend: Callable[[Params, jax.Array], jax.Array],
    mlp: Callable[[Params, jax.Array], jax.Array],
) -> jax.Array:
    """Patches in windows (P, W, 4, D) -> (P, W, D).

    Args:
      attend: the attention branch of a layer with its norm: its parameters and (P * W, 4, D) -> (P * W, 4, D).
      mlp: likewise its MLP with the norm, on any number of channels that fits the parameters.
    """
    P, W, _, D = x.shape
    if compression.kind == "window":
        windows = x.reshape(P * W, PATCHES, D)
        x = (windows + attend(params, windows)).reshape(x.shape)
    mean, joined = x.mean(2), x.reshape(P, W, PATCHES * D)
    if compression.kind == "average":
        return mean
    if compression.kind == "window":
        return mean + mlp(params, joined)
    h = linear(params["linear_0"], layer_norm(params["norm"], joined, NORM_EPS))
    return mean + linear(params["linear_1"], activate("gelu", h))
