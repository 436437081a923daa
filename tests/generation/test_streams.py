"""Sessions that watch a stream: what they hold and answer, what compiles, with standby tokens or without."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image
from test_chat import NEW, model
from test_generation import COMPILED, TOKENIZER

import pdrop_jax
from pdrop_jax.config import StandbyConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.download import DownloadRules
from pdrop_jax.inputs.frames import Standby
from pdrop_jax.inputs.images import Video
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model.cache import cache_bytes
from pdrop_jax.model.layers import layer_of, linear, text_norm
from pdrop_jax.model.params import init_params
from pdrop_jax.model.vlm import embed
from pdrop_jax.serve.conversation import ImageLimits, as_prompt
from pdrop_jax.serve.details import details
from pdrop_jax.serve.protocol import ChatRequest

ASKED = Sampling(NEW)
FRAMES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (20, 30, 3), np.uint8)) for n in range(12)]


def watching(mode="keep", of=None, **options):
    session = Session(of or model(), mode)
    session.watch(FRAMES[:1], **{"window": 2, "bank": 12, "question": "What is it?", **options})
    return session


def with_cache(model, dtype):
    return dataclasses.replace(model, config=model.config.with_cache_dtype(dtype))


@pytest.mark.parametrize("mode", ["keep", "rerank"])
def test_one_frame_is_a_picture(mode):
    """While nothing has left the window, the standing question is the question, and so is every answer."""
    session, plain = watching(mode), Session(model(), mode)
    expected = plain.ask("What is it?", FRAMES[0], ASKED)
    answer = session.ask("What is it?", sampling=ASKED)
    assert (answer.token_ids, answer.stage_lengths) == (expected.token_ids, expected.stage_lengths)
    assert session.turns == plain.turns
    if mode == "rerank":
        expected = plain.ask("Say more", sampling=ASKED)
        turns = [("What is it?", answer.text), ("Say more", None)]
        assert session.ask(turns, sampling=ASKED).token_ids == expected.token_ids


def test_a_quantized_cache_takes_less_and_answers_at_any_time():
    """A vector of 8 values takes 8 bytes and a scale of 4 in place of 32; ranks, and the output of "rerank", are as
    they were."""
    of = with_cache(model(), "int8")
    for mode in ("keep", "rerank"):
        session, plain = watching(mode, of), watching(mode)
        ours, theirs = (each._stream._state.caches for each in (session, plain))
        assert cache_bytes(ours) == cache_bytes(theirs) * (8 + 4) / 32
        rest = plain.watch([]).cache_bytes - cache_bytes(theirs)
        size = cache_bytes(ours) + rest
        for start in (1, 2, 6):  # the window is full, the bank fills, the bank has forgotten frames
            assert session.watch(FRAMES[start : 2 * start]).cache_bytes == size
            answer = session.ask("Hm?", sampling=ASKED)
            plain.watch(FRAMES[start : 2 * start])
            assert answer.stage_lengths == plain.ask("Hm?", sampling=ASKED).stage_lengths
        assert session.watch([]).frames == 10


@pytest.mark.parametrize("mode", ["keep", "rerank"])
def test_memory_is_constant_and_nothing_compiles_after_the_first_frame_and_question(mode):
    session = watching(mode)
    before = session.watch(FRAMES[1:3])
    first = session.ask("What is it?", sampling=ASKED)
    assert (before.frames, before.window, before.bank) == (3, 2, 1)
    COMPILED.clear()
    for start in range(3, 12):
        held = session.watch(FRAMES[start : start + 1])
        assert session.ask("Hm?", sampling=ASKED).cache_bytes == first.cache_bytes
    assert COMPILED == []
    assert held.cache_bytes == before.cache_bytes
    assert (held.frames, held.window, held.bank) == (12, 2, 3)  # 4 tokens of 16 are kept: a ratio of 0.3
    assert held.tokens[0] - before.tokens[0] == 2 * 4
    assert len(session.turns) == 10


def test_frames_may_come_from_anything_that_yields_them():
    one, two = watching(), watching()
    one.watch(Video(FRAMES[1:5]))
    two.watch(np.asarray(frame) for frame in FRAMES[1:5])
    assert one.ask("Hm?", sampling=ASKED).token_ids == two.ask("Hm?", sampling=ASKED).token_ids


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        (FRAMES[:1], {"window": 0}, "the window must hold at least 1 frame, got 0"),
        (FRAMES[:1], {"ratio": 0.0}, "the bank's ratio must be above 0 and at most 1, got 0.0"),
        (FRAMES[:1], {"bank": 3}, r"a bank of 3 tokens is smaller than one frame, of which it holds 4 of 16 tokens"),
        (FRAMES[:1], {"window": 99}, r"a window of 99 frames and a bank of 1 need \d+ positions"),
        ([FRAMES[0], FRAMES[1].resize((30, 30))], {}, "frame 2 has 30x30 pixels, but those before have 30x20"),
        ([FRAMES[0], 7], {}, "frame 2 is a int: expected a path, an image or an array"),
        ([np.zeros((2, 2))], {}, "an array of float64"),
        ("clip.mp4", {}, "watch takes a list of frames or anything that yields them, got a single picture"),
        (5, {}, "watch takes a list of frames or anything that yields them, got a int"),
        ([], {}, "a stream needs at least one frame, got none"),
    ],
)
def test_a_mistake_is_one_line(frames, options, message):
    with pytest.raises(UserError, match=message) as caught:
        Session(model(), "keep").watch(frames, **options)
    assert "\n" not in str(caught.value)


def test_a_mistake_leaves_the_stream_as_it_was():
    session = watching()
    with pytest.raises(UserError, match="frame 3 is a float"):
        session.watch([FRAMES[1], 0.5])
    assert session.watch([]).frames == 2
    for mistake, message in [
        (lambda: session.watch([FRAMES[1].resize((9, 9))]), "frame 3 has 9x9 pixels"),
        (lambda: session.watch(FRAMES[:1], window=3), "set by the first call of watch"),
        (lambda: session.ask("And this?", FRAMES[0]), "takes no other pictures"),
        (
            lambda: session.ask("Hm?", sampling=Sampling(200)),
            r"the question needs \d+ positions .* but the model has 256",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            mistake()
    expected = watching()
    expected.watch(FRAMES[1:2])
    assert session.ask("Hm?", sampling=ASKED).token_ids == expected.ask("Hm?", sampling=ASKED).token_ids
    asked = Session(model(), "keep")
    asked._messages = list(expected._messages)
    with pytest.raises(UserError, match="this session has been asked without a stream"):
        asked.watch(FRAMES[:1])


@functools.cache
def standby_model():
    tower = dataclasses.replace(model().config.vision, num_layers=4)  # of which three run
    config = dataclasses.replace(model().config, vision=tower, standby=StandbyConfig(8, temporal_layers=2, frames=3))
    params = jax.tree.map(lambda x: x + 0.1, init_params(config))  # so that attention over time is not zero
    return Model(config, params, Processor.load(TOKENIZER, config))


def test_a_prompt_shows_pictures_in_both_modes():
    processor = standby_model().processor
    contents = [
        {"type": "image", "image": FRAMES[0]},
        {"type": "image", "image": FRAMES[1], "mode": "standby"},
        {"type": "video", "video": FRAMES[2:4], "mode": "standby"},
        {"type": "text", "text": "Hm?"},
    ]
    batch = processor([[{"role": "user", "content": contents}]])
    text = int(batch.length[0]) - 16 - 3 * 8
    assert batch.bucket.images == (16, 0, 0, 16)
    assert (batch.image_id[0] == 1).sum() == 16
    assert batch.clips[0, :4].tolist() == [1, 2, 3, 3]
    answer = pdrop_jax.generate(standby_model(), [[{"role": "user", "content": contents}]], sampling=ASKED)
    assert answer.stage_lengths[0] == [text + 3 * 8 + n for n in (16, 4)]  # no drop takes standby tokens
    same = processor(["Hm?"], [[FRAMES[0], Standby(FRAMES[1]), Standby(Video(FRAMES[2:4]))]])
    np.testing.assert_array_equal(same.feature_index, batch.feature_index)
    with pytest.raises(UserError, match="content 1 of message 1 has mode 'still': expected 'focus' or 'standby'"):
        processor([[{"role": "user", "content": [{**contents[0], "mode": "still"}]}]])
    with pytest.raises(UserError, match="has mode 'standby' but no image of its own"):
        processor([[{"role": "user", "content": [{"type": "image", "mode": "standby"}]}]], [FRAMES[0]])
    with pytest.raises(UserError, match="a model with standby tokens: convert the checkpoint with --standby 16"):
        model().processor(["Hm?"], [Standby(FRAMES[0])])


def test_a_server_shows_a_video_by_its_standby_tokens():
    contents = [{"type": "video", "video": ["0", "1"], "mode": "standby"}, {"type": "text", "text": "Hm?"}]
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": contents}]})
    images = {f"messages.0.content.0.video.{n}": FRAMES[n] for n in range(2)}
    prompt = as_prompt(request, images, ImageLimits(count=2, pixels=10**6, videos=False, downloads=DownloadRules()))
    shown = Standby(Video(FRAMES[:2]))
    of = standby_model()
    with Engine(of, 1, max_new_tokens=NEW, buckets=[of.processor(["Hm?"], [shown]).bucket]) as engine:
        answer = engine.submit(prompt, sampling=ASKED).result()
        found = details("own", of, engine, [shown], answer)
    assert answer.token_ids == pdrop_jax.generate(of, ["Hm?"], [shown], ASKED).token_ids[0]
    assert found["images"] == [{"tokens": 16, "views": []}]
    assert [stage["image_tokens"] for stage in found["stages"]] == [0] * len(found["stages"])


def test_the_bank_holds_standby_tokens_as_a_video_shows_them():
    """Frame by frame they are those of the whole clip: attention over time sees the same frames of a block of three."""
    session, of = watching("keep", standby_model(), bank=24), standby_model()
    session.watch(FRAMES[1:7])
    layout, state = session._stream.layout, session._stream._state
    assert (layout.kept, layout.standby, layout.frame, layout.bank) == (8, 8, 24, 3)
    for tokens in state.tokens:
        assert np.asarray(tokens)[layout.prefix :][: 3 * 8].tolist() == [*range(16, 24)] * 3
    batch = of.processor(["Hm?"], [Standby(Video(FRAMES[:7]))])
    hidden = jax.jit(embed, static_argnums=(0, 3))(of.config, of.params, batch, batch.bucket.slots).hidden
    # The first layer's keys and values of frames 3, 4 and 2, whose places in the bank the next frames take in turn.
    layer = layer_of(of.params["stages"]["0"], 0)
    shown = hidden[0, np.flatnonzero(batch.feature_index[0, :, 0] >= 0)].reshape(7, 8, -1)
    h = text_norm(of.config.text, layer["attention_norm"], shown[np.array([3, 4, 2])])
    for name, held in (("k", state.caches[0].k), ("v", state.caches[0].v)):
        ours = np.asarray(held)[0, 0, :, layout.prefix :][:, : 3 * 8]
        expected = np.asarray(linear(layer["attention"][name], h)).reshape(3 * 8, *ours.shape[::2])
        np.testing.assert_allclose(ours.swapaxes(0, 1), expected, atol=1e-5)
    # A frame brings one crop to the tower, whatever the block holds.
    assert session._stream._batch(FRAMES[7]).crops.shape[1] == 1
    assert state.block.k.shape[1] == 3 * 8
    with pytest.raises(UserError, match="the bank of this model holds its 8 standby tokens of a frame"):
        Session(standby_model(), "keep").watch(FRAMES[:1], ratio=0.5)
