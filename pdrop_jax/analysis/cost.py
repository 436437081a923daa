"""Cost of a prompt: multiply-accumulates (MACs) by component, image tokens and KV cache size. Pure Python."""

import dataclasses
from collections.abc import Collection

from pdrop_jax.analysis.tower_cost import layer_macs, tower_macs
from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.schedule import DropSchedule

# Built-in scores that compute attention of one query row in the next layer. "all_text" does so for every text token,
# "quota" for every token, and the other built-in scores for none. User-defined scores cost what nobody knows and are
# not counted.
ONE_ROW = ("pyramiddrop", "fastv", "feather", "last_text")


@dataclasses.dataclass(frozen=True)
class PrefillMacs:
    """MACs of the prefill of one prompt, by component."""

    vision: int
    projector: int
    decoder: int  # all decoder layers, text and image tokens
    ranking: int
    head: int  # logits of the last token only

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.decoder + self.ranking + self.head


def prefill_macs(config: LlavaConfig, bucket: Bucket) -> PrefillMacs:
    """MACs of a prompt that fills ``bucket``. Attention is counted without the causal mask, as in the paper."""
    text = config.text
    D, N, K, H = text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim
    plan = config.schedule.plan(text.num_layers, bucket)
    decoder = sum(
        stage.num_layers * layer_macs(stage.slots, D, N, K, H, 3 * D * text.intermediate_size) for stage in plan
    )
    score = config.schedule.score

    before = [stage.slots for stage in plan[:-1]]
    rows = {"all_text": [bucket.text] * len(before), "quota": before}.get(score, [1] * len(before))
    # Key projections of all tokens, query projections, and their dot products.
    ranking = sum(n * D * K * H + q * (D * N * H + n * N * H) for n, q in zip(before, rows, strict=True))
    if not bucket.images or score not in (*ONE_ROW, "all_text", "quota"):
        ranking = 0
    tower = tower_macs(config, bucket)
    return PrefillMacs(
        vision=tower.vision,
        projector=tower.projector,
        decoder=decoder,
        ranking=ranking,
        head=D * text.vocab_size,
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a prompt with ``text_tokens`` text tokens and at most one image.

    Attributes:
      image_tokens: image tokens in each stage.
      average_tokens: image tokens per layer, averaged over layers.
      paper_macs: see the function ``paper_macs``.
      prefill: all MACs, with attention counted without the causal mask.
      text_macs: decoder MACs of a prompt with the same text and no image.
      causal_macs: MACs of the prefill that causal attention can skip, for keys that come after their query.
      image_cache_bytes: size of the KV cache of the image tokens.
      cache_bytes: size of the KV cache of all prompt tokens.
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
    """Cost of a prompt that fills ``bucket``, which has at most one image.

    Args:
      itemsize: bytes per element of a KV cache that is not quantized.
    """
    text, schedule, image_tokens = config.text, config.schedule, sum(bucket.images)
    plan = schedule.plan(text.num_layers, bucket)
    images, bytes_per_token = layer_tokens(text, schedule, image_tokens), token_bytes(text, itemsize)
    dense = dataclasses.replace(config, schedule=DropSchedule.none())
    masked_pairs = sum(stage.num_layers * stage.slots * (stage.slots - 1) for stage in plan)
    return Cost(
        schedule=schedule,
        text_tokens=bucket.text,
        image_tokens=tuple(stage.slots - bucket.text for stage in plan),
        average_tokens=images / text.num_layers,
        paper_macs=paper_macs(text, schedule, image_tokens),
        prefill=prefill_macs(config, bucket),
        text_macs=prefill_macs(dense, Bucket(bucket.text)).decoder,
        causal_macs=masked_pairs * text.num_heads * text.head_dim,
        image_cache_bytes=images * bytes_per_token,
        cache_bytes=(images + bucket.text * text.num_layers) * bytes_per_token,
    )


def training_macs(config: LlavaConfig, bucket: Bucket, targets: float, trained: Collection[str]) -> float:
    """MACs of one row of a training step that fills ``bucket``, without recomputation by remat.

    The backward pass costs as much as the forward pass for the gradient of the activations, and as much again for the
    gradient of the weights. It stops at the first trained component.

    Args:
      targets: positions whose logits are computed.
      trained: trained parameter groups, out of "vision", "compressor", "projector", "llm" and "lora".
    """
    forward, tower = prefill_macs(config, bucket), tower_macs(config, bucket)
    decoder = 3 if "llm" in trained else 2
    first = "vision" in trained  # the gradient goes through everything behind the first trained component
    through = first or ("compressor" in trained and config.vision.early_compression is not None)
    return (
        tower.first * (3 if first else 1)
        + tower.compressor * (3 if "compressor" in trained else 1 + first)
        + tower.later * (3 if first else 1 + through)
        + tower.projector * (3 if "projector" in trained else 1 + through)
        + (forward.decoder + forward.head * targets) * decoder
        + forward.ranking
    )


def decode_macs(config: LlavaConfig, bucket: Bucket) -> int:
    """MACs of decoding the first new token after a prompt that fills ``bucket``."""
    text = config.text
    D, N, K, H = text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim
    weights = 2 * D * N * H + 2 * D * K * H + 3 * D * text.intermediate_size
    plan = config.schedule.plan(text.num_layers, bucket)
    return sum(stage.num_layers * (weights + 2 * (stage.slots + 1) * N * H) for stage in plan) + D * text.vocab_size


def paper_macs(text: TextConfig, schedule: DropSchedule, image_tokens: int) -> float:
    """The paper's cost of the language model (section 3.3): sum over stages of L_s * (4 n D^2 + 2 n^2 D + 3 n D F).

    It counts MACs of the image tokens only, without text, vision tower, projector, head and ranking. It assumes
    attention without a causal mask, as many KV heads as query heads, and n = tokens * ratio, not truncated.
    """
    D, F = text.hidden_size, text.intermediate_size
    stages = schedule.plan(text.num_layers, Bucket(0, (image_tokens,)))
    counts = [(stage.num_layers, image_tokens * stage.ratio) for stage in stages]
    return sum(L * (4 * n * D**2 + 2 * n**2 * D + 3 * n * D * F) for L, n in counts)


def layer_tokens(text: TextConfig, schedule: DropSchedule, image_tokens: int) -> int:
    """Image tokens per layer, summed over all layers."""
    plan = schedule.plan(text.num_layers, Bucket(0, (image_tokens,)))
    return sum(stage.num_layers * stage.slots for stage in plan)


def token_bytes(text: TextConfig, itemsize: int) -> int:
    """KV cache bytes of one token in one layer, with ``itemsize`` bytes per element.

    A quantized cache, ``text.cache_dtype``, has 8 or 4 bits per element (int4 on a CPU: 8) and a float32 scale per
    head.
    """
    head = text.head_dim * itemsize
    if text.cache_dtype is not None:
        head = text.head_dim * {"int8": 8, "int4": 4}[text.cache_dtype] // 8 + 4
    return 2 * text.num_kv_heads * head
