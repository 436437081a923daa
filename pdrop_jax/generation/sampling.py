"""How answers are sampled. This module does not import jax: the device side is ``next_token``."""

import dataclasses

from pdrop_jax.errors import UserError

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6  # logits divided by a smaller temperature may overflow
MAX_TOP_K = 2**31 - 1
NUM_SEEDS = 2**32  # a PRNG key holds 32 bits of a seed, so larger seeds would repeat the smaller ones


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are sampled. The default is greedy decoding.

    Attributes:
      max_new_tokens: Maximum number of new tokens in an answer.
      temperature: Sampling temperature; 0 is greedy decoding.
      top_k: Sample from the k most likely tokens only; 0 disables the limit.
      top_p: Sample from the smallest set of most likely tokens whose total probability reaches this value (nucleus
        sampling); 1 disables the limit.
      seed: RNG seed for sampling.

    Raises:
      UserError: a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE):
            raise UserError(
                f"temperature must be 0 (greedy) or in {MIN_TEMPERATURE:g}..{MAX_TEMPERATURE:g}, got {self.temperature}"
            )
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise UserError(f"top_k must be in 0..{MAX_TOP_K}, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be greater than 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < NUM_SEEDS:
            raise UserError(f"seed must be in 0..{NUM_SEEDS - 1}, got {self.seed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def for_batch(self, number: int) -> "Sampling":
        """The same with the seed of the ``number``-th batch of a run, so that batches sample independently."""
        return dataclasses.replace(self, seed=(self.seed + number) % NUM_SEEDS)
