"""Generation: what is drawn, when it stops, and that nothing is compiled twice."""

import collections
import dataclasses
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pdrop_jax import compilation_cache
from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.engine import decode, generate, generate_batch, start
from pdrop_jax.generation.next_token import sample, token_sampler
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.generation.timer import Timer
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model import vlm
from pdrop_jax.model.params import abstract_params
from pdrop_jax.schedule import DropSchedule

TOKENIZER = pathlib.Path(__file__).parents[2] / "examples/tiny_tokenizer"
CONFIG = LlavaConfig(
    VisionConfig(28, 7, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2),  # 16 image tokens
    TextConfig(320, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_length=256),
    DropSchedule((1,), (0.3,)),
    template="plain",
    eos_token_ids=(1, 2),
)
RED, BLUE = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 30), "blue")
PROMPTS, IMAGES = ["What is it?", "Say more"], [RED, None]


@functools.cache
def model(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), dtype)

    return Model(CONFIG, jax.tree.map(draw, abstract_params(CONFIG)), Processor.load(TOKENIZER, CONFIG))


@functools.cache
def greedy(max_new_tokens=12):
    return generate(model(), PROMPTS, IMAGES, Sampling(max_new_tokens))


def test_greedy_takes_the_best_token_of_each_step():
    batch = model().processor(PROMPTS, IMAGES)
    prefill = jax.jit(functools.partial(vlm.prefill, CONFIG, new_slots=8))
    step = jax.jit(functools.partial(vlm.decode_step, CONFIG))
    logits, state, _ = prefill(model().params, batch)
    tokens = [logits.argmax(-1).astype(jnp.int32)]
    for n in range(7):
        logits, state = step(model().params, tokens[-1], state, jnp.int32(n))
        tokens.append(logits.argmax(-1).astype(jnp.int32))
    assert [ids[:8] for ids in greedy().token_ids] == np.stack(tokens, 1).tolist()


def test_the_picture_and_the_question_matter():
    other_picture = generate(model(), PROMPTS, [BLUE, None], Sampling(12))
    other_question = generate(model(), ["Where is it?", "Say more"], IMAGES, Sampling(12))
    assert other_picture.token_ids[0] != greedy().token_ids[0]
    assert other_question.token_ids[0] != greedy().token_ids[0]
    assert other_picture.token_ids[1] == other_question.token_ids[1] == greedy().token_ids[1]


def test_a_row_of_a_batch_answers_as_if_it_were_alone():
    batch = model().processor(PROMPTS, IMAGES)
    for b in range(2):
        alone = jax.tree.map(lambda x: x[b : b + 1], batch)  # noqa: B023
        answer = generate_batch(model(), alone, Sampling(12))
        assert answer.token_ids == [greedy().token_ids[b]]


def test_fewer_new_tokens_are_the_beginning_of_more():
    assert greedy(5).token_ids == [ids[:5] for ids in greedy().token_ids]


def test_one_new_token_needs_no_decode_step():
    assert greedy(1).token_ids == [ids[:1] for ids in greedy().token_ids]


def with_stop(token):
    config = dataclasses.replace(CONFIG, eos_token_ids=(2, token))
    return dataclasses.replace(model(), processor=dataclasses.replace(model().processor, config=config))


def test_a_row_ends_before_its_stop_token_and_the_others_go_on():
    first, second = greedy().token_ids
    stop = next(token for token in first[1:] if token not in second)
    answer = generate(with_stop(stop), PROMPTS, IMAGES, Sampling(12))
    assert answer.token_ids == [first[: first.index(stop)], second]


def test_a_stop_token_at_once_is_an_empty_answer():
    first, _ = greedy().token_ids
    answer = generate(with_stop(first[0]), PROMPTS, IMAGES, Sampling(12))
    assert answer.token_ids[0] == []
    assert answer.texts[0] == ""


def test_streamed_pieces_are_the_texts():
    pieces = ["", ""]

    def stream(row, text):
        pieces[row] += text

    answer = generate(model(), PROMPTS, IMAGES, Sampling(11), stream=stream)
    assert [piece.strip() for piece in pieces] == answer.texts
    assert answer.token_ids == [ids[:11] for ids in greedy().token_ids]


def test_texts_are_the_decoded_tokens():
    assert greedy().texts == [model().processor.decode(ids) for ids in greedy().token_ids]


def test_what_each_stage_saw():
    batch = model().processor(PROMPTS, IMAGES)
    with_image, text_only = batch.length.tolist()
    assert greedy().stage_lengths == [[with_image, with_image - 16 + int(16 * 0.3)], [text_only, text_only]]


def test_the_kept_tokens_are_counted_within_their_image():
    (kept,) = greedy().kept[0][0]
    assert len(kept) == int(16 * 0.3)
    assert kept == sorted(set(kept))
    assert set(kept) <= set(range(16))
    assert greedy().kept[1] == [[]]


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_the_caches_hold_both_stages_and_the_new_tokens(dtype, size):
    answer = generate(model(dtype), PROMPTS, IMAGES, Sampling(12))
    slots = (32 + 16 + 64) + (32 + int(16 * 0.3) + 64)
    assert answer.cache_bytes == 2 * size * 2 * slots * 2 * 8  # k and v, bytes, rows, slots, heads, head dim


def test_a_bfloat16_model_answers():
    answer = generate(model(jnp.bfloat16), PROMPTS, IMAGES, Sampling(12))
    assert [len(ids) for ids in answer.token_ids] == [12, 12]
    assert answer.token_ids == generate(model(jnp.bfloat16), PROMPTS, IMAGES, Sampling(12)).token_ids


def drawn(**options):
    return generate(model(), PROMPTS, IMAGES, Sampling(12, **options)).token_ids


def test_a_seed_repeats_itself_and_another_differs():
    assert drawn(temperature=1.0, seed=3) == drawn(temperature=1.0, seed=3)
    assert drawn(temperature=1.0, seed=3) != drawn(temperature=1.0, seed=4)


def test_every_step_and_row_draws_anew():
    first, second = drawn(temperature=1e6, seed=1)  # all but uniform: only the random numbers decide
    assert len(set(first)) > 6
    assert first != second


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_draw_is_greedy(narrow):
    assert drawn(**{"temperature": 2.0, **narrow}) == greedy().token_ids


BAD = [
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": 1e-40},  # the logits divided by it overflow, and every answer is token 0
    {"top_k": 2**31},
    {"top_p": float("nan")},
    {"seed": 2**32},  # as a key it is seed 0
    {"seed": 2**63},
    {"seed": -1},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_values_that_cannot_be_drawn_with(options):
    (name,) = options
    with pytest.raises(UserError, match=rf"^{name} must be [^\n]*, got [^\n]*$"):
        Sampling(**options)


@pytest.mark.parametrize("extreme", [{"top_k": 2**31 - 1}, {"temperature": 1e-6}, {"seed": 2**32 - 1}], ids=str)
def test_the_largest_and_smallest_values_draw(extreme):
    tokens = drawn(**{"temperature": 1.0, "seed": 1, **extreme})
    if "temperature" in extreme:
        assert tokens == greedy().token_ids
    if "top_k" in extreme:
        assert tokens == drawn(temperature=1.0, seed=1)
    if "seed" in extreme:
        assert tokens != drawn(temperature=1.0, seed=2**31 - 1)


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event == compilation_cache.COMPILED else None
)


def test_three_rows_are_run_as_four():
    """With a row of padding, which nothing shows."""
    prompts, images = [*PROMPTS, "Where?", "Why?"], [*IMAGES, BLUE, None]
    four = generate(model(), prompts, images, Sampling(12))
    programs = start._cache_size(), decode._cache_size()
    pieces = collections.defaultdict(str)

    def stream(row, text):
        pieces[row] += text

    three = generate(model(), prompts[:3], images[:3], Sampling(12), stream=stream)
    assert (start._cache_size(), decode._cache_size()) == programs
    for name in ("texts", "token_ids", "stage_lengths", "image_tokens", "kept"):
        assert getattr(three, name) == getattr(four, name)[:3], name
    assert [pieces[row].strip() for row in range(3)] == three.texts
    assert len(pieces) == len(three.scores) == 3
    np.testing.assert_array_equal(three.first_logits, four.first_logits[:3])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_second_call_in_the_same_bucket_compiles_nothing(temperature):
    generate(model(), PROMPTS, IMAGES, Sampling(3, temperature))
    before = len(COMPILED)
    assert before > 0
    again = generate(
        model(),
        ["How many people do you see?", "Why?"],
        [None, BLUE],
        Sampling(
            max_new_tokens=40,  # the same capacity
            temperature=temperature and 1.3,
            top_k=5,
            top_p=0.9,
            seed=9,
        ),
        stream=lambda row, text: None,
    )
    assert COMPILED[before:] == []
    assert again.compile_seconds == 0


def test_compiling_is_timed_apart_from_running():
    timer, begin = Timer(), time.perf_counter()
    twice = jax.jit(lambda x: 2 * x)
    for n in range(2):
        timer.call(twice, np.float32(n))
        if n == 0:
            compiled = timer.compile_seconds
    assert 0 < compiled == timer.compile_seconds
    assert 0 < timer.lap() < time.perf_counter() - begin - compiled


LOGITS = np.array([2.0, 1.5, 1.0, 1.0, 0.0, -1.0, -2.0, 0.5], np.float32)
jitted_sample = jax.jit(sample)


def frequencies(**options):
    rows = jnp.tile(jnp.asarray(LOGITS), (20_000, 1))
    counts = collections.Counter(jitted_sample(rows, jax.random.key(0), settings(**options)).tolist())
    return np.array([counts[token] / len(rows) for token in range(len(LOGITS))])


def settings(temperature=1.0, top_k=0, top_p=1.0):
    return token_sampler(Sampling(1, temperature, top_k, top_p))


def probabilities(temperature=1.0, top_k=0, top_p=1.0):
    """As transformers warps logits."""
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    logits = LogitsProcessorList(warpers)(None, torch.tensor(LOGITS)[None])
    return logits.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 2},
        {"top_k": 100},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_transformers_would(options):
    ours, expected = frequencies(**options), probabilities(**options)
    assert ((ours > 0) == (expected > 0)).all()
    assert np.abs(ours - expected).max() < 0.015  # four standard deviations of 20000 draws


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=f"^{name} must be "):
        Sampling(**options)


def test_more_new_tokens_than_the_model_has_positions_are_refused():
    with pytest.raises(UserError, match="need"):
        generate(model(), PROMPTS, IMAGES, Sampling(250))
