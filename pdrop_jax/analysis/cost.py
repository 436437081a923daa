"""What a prompt costs: multiply-accumulates (MACs) by part, tokens, cache. Pure Python."""

import dataclasses
from collections.abc import Collection

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.schedule import DropSchedule

# Query rows that a score asks of the next layer: all of the text, one, or, for those that are not named, none. What a
# score of the user's costs is not known.
ONE_ROW = ("pyramiddrop", "fastv", "feather", "last_text")


@dataclasses.dataclass(frozen=True)
class PrefillMacs:
    """MACs of one prompt's prefill, by part."""

    vision: int
    projector: int
    decoder: int  # layers, text and image tokens
    ranking: int
    head: int  # the last token only

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.decoder + self.ranking + self.head

    @property
    def language(self) -> int:
        """Without the vision tower and the projector, which no drop changes."""
        return self.decoder + self.ranking + self.head


def prefill_macs(config: LlavaConfig, bucket: Bucket) -> PrefillMacs:
    """MACs of a prompt that fills ``bucket``. Attention counts full squares, as the paper does."""
    text, vision = config.text, config.vision
    D, N, K, H = text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim
    plan = config.schedule.plan(text.num_layers, bucket)
    decoder = sum(stage.num_layers * _layer(stage.slots, D, N, K, H, 3 * D * text.intermediate_size) for stage in plan)
    score = config.schedule.score
    rows = bucket.text if score == "all_text" else 1
    # Keys of all tokens, the queries, their products.
    ranking = sum(stage.slots * D * K * H + rows * (D * N * H + stage.slots * N * H) for stage in plan[:-1])
    if not bucket.images or score not in (*ONE_ROW, "all_text"):
        ranking = 0
    V, P = vision.hidden_size, vision.patch_size
    tokens = vision.class_tokens + vision.num_patches
    VN, VH = vision.num_heads, vision.head_dim
    tower = config.vision_layers * _layer(tokens, V, VN, VN, VH, 2 * V * vision.intermediate_size)
    tower += vision.num_patches * 3 * P**2 * V
    projector = (config.image_tokens + config.frame_tokens) * (V * D + (config.projector_layers - 1) * D**2)
    return PrefillMacs(bucket.crops * tower, bucket.crops * projector, decoder, ranking, D * text.vocab_size)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a prompt of ``text_tokens`` and one image costs.

    Attributes:
      image_tokens: of each stage.
      average_tokens: image tokens that a layer sees, averaged over layers.
      paper_macs: see ``paper_macs``.
      prefill: all MACs, attention as full squares.
      text_macs: those of the decoder that the text alone would cost.
      causal_macs: those of the prefill that a causal attention need not do: queries with keys behind them.
      image_cache_bytes: keys and values of the image tokens.
      cache_bytes: of all tokens.
    """

    schedule: DropSchedule
    text_tokens: int
    image_tokens: tuple[int, ...]
    average_tokens: float
    paper_macs: float
    prefill: PrefillMacs
    text_macs: int
    causal_macs: int
    image_cache_bytes: int
    cache_bytes: int


def cost_of(config: LlavaConfig, bucket: Bucket, itemsize: int = 2) -> Cost:
    """The cost of a prompt that fills ``bucket``, which has one image or none.

    Args:
      itemsize: bytes of a number in the cache.
    """
    text, schedule, image_tokens = config.text, config.schedule, sum(bucket.images)
    plan = schedule.plan(text.num_layers, bucket)
    images, in_cache = layer_tokens(text, schedule, image_tokens), token_bytes(text, itemsize)
    alone = dataclasses.replace(config, schedule=DropSchedule.none())
    behind = sum(stage.num_layers * stage.slots * (stage.slots - 1) for stage in plan)
    return Cost(
        schedule,
        bucket.text,
        tuple(stage.slots - bucket.text for stage in plan),
        images / text.num_layers,
        paper_macs(text, schedule, image_tokens),
        prefill_macs(config, bucket),
        prefill_macs(alone, Bucket(bucket.text)).decoder,
        behind * text.num_heads * text.head_dim,
        images * in_cache,
        (images + bucket.text * text.num_layers) * in_cache,
    )


def training_macs(config: LlavaConfig, bucket: Bucket, targets: float, trained: Collection[str]) -> float:
    """MACs of one row of a training step that fills ``bucket``, what remat computes again not counted.

    A backward pass costs what the forward pass did for the gradient to go through, and as much again for the gradient
    of weights; it ends at the first part that is trained.

    Args:
      targets: positions whose logits are made.
      trained: of "vision", "projector", "llm" and "lora".
    """
    forward = prefill_macs(config, bucket)
    decoder = 3 if "llm" in trained else 2
    through = 1 + ("vision" in trained)
    return (
        forward.vision * (3 if "vision" in trained else 1)
        + forward.projector * (3 if "projector" in trained else through)
        + (forward.decoder + forward.head * targets) * decoder
        + forward.ranking
    )


def decode_macs(config: LlavaConfig, bucket: Bucket) -> int:
    """MACs of the first new token behind a prompt that fills ``bucket``."""
    text = config.text
    D, N, K, H = text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim
    weights = 2 * D * N * H + 2 * D * K * H + 3 * D * text.intermediate_size
    plan = config.schedule.plan(text.num_layers, bucket)
    return sum(stage.num_layers * (weights + 2 * (stage.slots + 1) * N * H) for stage in plan) + D * text.vocab_size


def _layer(n: int, D: int, N: int, K: int, H: int, mlp: int) -> int:
    """A transformer layer on n tokens, its MLP having ``mlp`` weights."""
    return n * (2 * D * N * H + 2 * D * K * H + mlp) + 2 * n * n * N * H


def paper_macs(text: TextConfig, schedule: DropSchedule, image_tokens: int) -> float:
    """The paper's cost of the language model (section 3.3): sum over stages of L_s * (4 n D^2 + 2 n^2 D + 3 n D F).

    Multiply-accumulates of the image tokens only: no text, vision tower, projector, head or ranking, full attention
    squares, query heads as many as key-value heads, n = tokens * ratio as it comes, not truncated.
    """
    D, F = text.hidden_size, text.intermediate_size
    stages = schedule.plan(text.num_layers, Bucket(0, (image_tokens,)))
    counts = [(stage.num_layers, image_tokens * stage.ratio) for stage in stages]
    return sum(L * (4 * n * D**2 + 2 * n**2 * D + 3 * n * D * F) for L, n in counts)


def layer_tokens(text: TextConfig, schedule: DropSchedule, image_tokens: int) -> int:
    """Image tokens that the layers see, added up."""
    plan = schedule.plan(text.num_layers, Bucket(0, (image_tokens,)))
    return sum(stage.num_layers * stage.slots for stage in plan)


def token_bytes(text: TextConfig, itemsize: int) -> int:
    """Key and value of one token in one layer, of numbers of ``itemsize`` bytes."""
    return 2 * text.num_kv_heads * text.head_dim * itemsize
