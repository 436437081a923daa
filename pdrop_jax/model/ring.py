"""Where the tokens of a stream of frames are in the caches: a window of frames in focus and a bank of older ones.

The cache of each stage has fixed slots::

    prefix | bank: R frames of b tokens | window: W frames of n tokens | text

Frame f is in slot f % W of the window. When the window is full, the tokens that the bank takes of the oldest frame are
copied into slot (f - W) % R of the bank, and the new frame overwrites it in the window; a full bank overwrites its
oldest frame. ``text`` holds the standing question while a frame is run, and nothing afterwards.

So slots are in no order. What attention needs to know of a slot, its place among the tokens of the stage and the
position that its key is rotated to, follows from the number of frames so far. Positions are those of a prompt that
consists of what is held at that moment, so they stay within the model's however long the stream is. For that, keys are
cached without rotation and rotated when they are read, as in StreamingLLM (section 3.2).
"""

import dataclasses

import jax
import jax.numpy as jnp

from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig
from pdrop_jax.model.slot_attention import EVERYTHING, Ring
from pdrop_jax.schedule import Stage


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static sizes of a stream.

    Attributes:
      prefix: P, text tokens in front of the frames.
      frame: n, tokens of a frame before any drop, standby tokens included.
      standby: the last so many of them are standby tokens, which no drop ranks.
      extent: positions that a frame takes where tokens keep those from before the drops.
      kept: b, tokens of a frame in the bank before any drop.
      window: W, frames in focus, the newest included.
      bank: R, frames in the bank.
      text: tokens of the standing question.
    """

    prefix: int
    frame: int
    standby: int
    extent: int
    kept: int
    window: int
    bank: int
    text: int

    def plan(self, config: LlavaConfig) -> tuple[Stage, ...]:
        """The stages of one frame with the standing question behind it; standby tokens count as text."""
        bucket = Bucket(self.text + self.standby, (self.frame - self.standby,))
        return config.schedule.plan(config.text.num_layers, bucket)

    def counts(self, config: LlavaConfig) -> list[tuple[int, int]]:
        """(n, b) of each stage: the tokens of a frame in the window and in the bank."""
        found = [stage.slots - self.text for stage in self.plan(config)]
        return [(n, min(n, self.kept)) for n in found]

    def most(self, n: int, b: int) -> int:
        """The most tokens that a stage holds between two frames."""
        return self.prefix + self.bank * b + self.window * n

    def positions(self, config: LlavaConfig) -> int:
        """Positions of the prompt that all that can be held makes."""
        if config.schedule.positions == "dense" and not config.text.mrope_sections:
            return self.most(self.frame, self.kept)
        return self.prefix + (self.bank + self.window) * self.extent

    def slots(self, stage: int, config: LlavaConfig, number: jax.Array) -> jax.Array:
        """Slots of a stage for the tokens of frame ``number`` () int32 and the text behind them, (n + text,) int32."""
        n, b = self.counts(config)[stage]
        start = self.prefix + self.bank * b
        own = start + number % self.window * n + jnp.arange(n)
        return jnp.concatenate([own, start + self.window * n + jnp.arange(self.text)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """The slots of one stage between two frames.

    Attributes:
      order: (C,) int32, the place of the slot's token among those held, ``EVERYTHING`` if it holds none.
      frame: (C,) int32, to which of the frames held it belongs, from the oldest on; -1 for the prefix and the text.
      length: () int32, tokens that are held.
      frames: () int32, frames that are held.
    """

    order: jax.Array
    frame: jax.Array
    length: jax.Array
    frames: jax.Array


def held(layout: Layout, n: int, b: int, frames: jax.Array) -> Held:
    """What a stage with ``n`` and ``b`` tokens a frame holds once ``frames`` () int32 were watched.

    Example, P = 1, W = 2, R = 2, n = 2, b = 1, after the frames 0 to 4, of which the bank has 1 and 2::

        slot     prefix | bank 0 | bank 1 | window 0 | window 1 | text
        holds      .    |   2    |   1    |   4  4   |   3  3   |
        order      0    |   2    |   1    |   5  6   |   3  4   | nothing
        frame     -1    |   1    |   0    |   3  3   |   2  2   |
    """
    P, W, R = layout.prefix, layout.window, layout.bank
    in_window, in_bank = jnp.minimum(frames, W), jnp.clip(frames - W, 0, R)
    window = (jnp.arange(W) - jnp.maximum(frames - W, 0)) % W  # frames of the window that are older than each slot's
    bank = (jnp.arange(R) - jnp.maximum(frames - W - R, 0)) % R

    def region(older: jax.Array, used: jax.Array, first: jax.Array | int, size: int) -> jax.Array:
        order = first + older[:, None] * size + jnp.arange(size)
        return jnp.where(older[:, None] < used, order, EVERYTHING).ravel()

    start = P + in_bank * b
    nothing, none = jnp.full(layout.text, EVERYTHING), jnp.full(layout.text, -1)
    order = [jnp.arange(P), region(bank, in_bank, P, b), region(window, in_window, start, n), nothing]
    frame = [jnp.full(P, -1), jnp.repeat(bank, b), jnp.repeat(window + in_bank, n), none]
    return Held(jnp.concatenate(order), jnp.concatenate(frame), start + in_window * n, in_bank + in_window)


def original_positions(layout: Layout, held: Held, tokens: jax.Array, offsets: jax.Array) -> jax.Array:
    """Positions before the first drop of what the slots hold, (C,) or (C, 3) int32.

    Args:
      tokens: (C,) int32, which token of its frame a slot holds, or which of the prefix.
      offsets: (n,) or (n, 3) int32, positions of a frame's tokens from its start.
    """
    start, of_frame = layout.prefix + held.frame * layout.extent, held.frame >= 0
    if offsets.ndim == 2:
        start, of_frame = start[:, None], of_frame[:, None]
    text = tokens if offsets.ndim == 1 else jnp.broadcast_to(tokens[:, None], (len(tokens), 3))
    return jnp.where(of_frame, start + offsets[jnp.minimum(tokens, layout.frame - 1)], text)


def original_slots(layout: Layout, held: Held, tokens: jax.Array) -> jax.Array:
    """Slots before any drop, (C,) int32, as if the frames that are held were whole."""
    return jnp.where(held.frame >= 0, layout.prefix + held.frame * layout.frame + tokens, tokens)


def rope_positions(
    config: LlavaConfig, layout: Layout, stage: int, held: Held, tokens: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Where the key of each slot is rotated to, (C,) or (C, 3) int32; see ``decoder.positions_of``."""
    if config.schedule.positions == "original" or (config.text.mrope_sections and not stage):
        positions = original_positions(layout, held, tokens, offsets)
    else:
        positions = held.order
    used = (held.order < EVERYTHING).reshape(-1, *[1] * (positions.ndim - 1))
    return jnp.where(used, positions, 0)


def next_position(layout: Layout, held: Held) -> jax.Array:
    """The position before any drop of the next token, () int32."""
    return layout.prefix + held.frames * layout.extent


def shifted_slots(layout: Layout, first: Held, held: Held, tokens: jax.Array) -> jax.Array:
    """``original_slots`` such that the next token is in slot ``first.length``, that of the first stage's tokens."""
    end = layout.prefix + first.frames * layout.frame
    return original_slots(layout, held, tokens) - end + first.length


def ring_of(
    config: LlavaConfig, layout: Layout, stage: int, number: jax.Array, tokens: jax.Array, offsets: jax.Array
) -> tuple[Ring, jax.Array]:
    """The ring of a stage for running frame ``number``, and how many tokens are before that frame, (1,) int32."""
    first, now = without_newest(config, layout, 0, number), without_newest(config, layout, stage, number)
    index = shifted_slots(layout, first, now, tokens) if config.text.by_slots else now.order
    positions = rope_positions(config, layout, stage, now, tokens, offsets)
    ring = Ring(layout.slots(stage, config, number)[None], now.order[None], index[None], positions[None])
    return ring, now.length[None]


def without_newest(config: LlavaConfig, layout: Layout, stage: int, number: jax.Array) -> Held:
    """What a stage holds of the frames before frame ``number`` while that is run: one less than the window's."""
    n, b = layout.counts(config)[stage]
    found = held(layout, n, b, number + 1)
    order = found.order.at[layout.slots(stage, config, number)].set(EVERYTHING)
    return Held(order, found.frame, found.length - n, found.frames - 1)
