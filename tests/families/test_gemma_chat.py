"""Conversations with Gemma 3: windows go by the slots before the drops, in the caches too."""

import re

import numpy as np
import pytest
import tiny_gemma
import torch
from checks import SAMPLING, at_once, check_conversation
from tiny_gemma import PAN_AND_SCAN, photo, torch_inputs, torch_inputs_of, torch_model
from torch_gemma_drops import drop_run

from pdrop_jax.errors import UserError
from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.pretrained import load
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.messages import Message, read_conversation
from pdrop_jax.schedule import DropSchedule

# The first two questions fit in a bucket, the third in a larger one.
TURNS = [
    ("What is there in this picture, and where is it?", [photo(60, 200, 1)]),
    ("Hm?", []),
    ("Here?", [photo(300, 90, 2)]),
]
# All fit in the bucket of the first question, so that few programs are compiled.
IN_ONE_BUCKET = [
    (f"{'Look closely. ' * 7}What?", [photo(60, 200, 1), photo(200, 60, 2), photo(110, 120, 3)]),
    ("And it?", []),
    ("Here?", [photo(50, 190, 4)]),
    ("So?", []),
]


@pytest.mark.parametrize(
    ("schedule", "mode", "turns", "buckets"),
    [
        (DropSchedule((2, 4), (0.5, 0.2)), "rerank", TURNS, 2),
        (DropSchedule((0,), (0.5,), "original"), "rerank", IN_ONE_BUCKET, 1),
        (DropSchedule.none(), "keep", IN_ONE_BUCKET, 1),
    ],
)
def test_a_conversation_is_answered_as_if_asked_at_once(schedule, mode, turns, buckets, gemma):
    model = load(gemma[1], schedule=schedule)
    assert len(check_conversation(model, mode, turns)) == buckets


@pytest.mark.parametrize("positions", ["dense", "original"])
def test_tokens_that_were_dropped_stay_dropped(positions, gemma):
    """The first turn is a prefill; afterwards the cache of every stage, and where its tokens stood, is continued."""
    model = load(gemma[1], schedule=DropSchedule((2, 4), (0.5, 0.2), positions))
    session = Session(model, "keep")
    question, pictures = TURNS[0]
    first = session.ask(question, pictures, SAMPLING)
    assert first.kept == at_once(model, Session(model), "<image>" * len(pictures) + question, pictures).kept[0]
    index = [np.asarray(x[0]) for x in session._past.model.index]
    lengths = [int(n[0]) for n in session._past.model.lengths]
    # A stage's cached tokens stand where they stood before any drop: text, the kept tokens of a picture, text.
    asked = model.processor.row(question, pictures).ids
    places = [n for n, id_ in enumerate(asked) if id_ == IMAGE_PLACEHOLDER]
    shown = [n + 15 * before for before, n in enumerate(places)]  # each stands for 16 tokens
    for stage, kept in enumerate(first.kept, 1):
        text = [n for n in range(lengths[0]) if not any(picture <= n < picture + 16 for picture in shown)]
        stay = [picture + n for picture, image in zip(shown, kept, strict=True) for n in image]
        assert index[stage][: lengths[stage]].tolist() == sorted(text + stay)
        new = index[stage][lengths[stage] : lengths[stage] + 4].tolist()
        assert new == list(range(lengths[0], lengths[0] + 4))
    second = session.ask(*TURNS[1], SAMPLING)
    assert second.kept == first.kept
    # The whole conversation behind the first prompt as new tokens of a torch model whose tokens are deleted.
    inputs, ids = torch_inputs(question, pictures), session._past.ids
    new = ids[len(asked) : session._past.asked]
    assert len(new) > tiny_gemma.WINDOW
    for token in second.token_ids:
        with torch.no_grad():
            logits, kept = drop_run(torch_model(), inputs, (2, 4), (0.5, 0.2), positions=positions, new_ids=new)
        assert kept == first.kept
        assert token == int(logits[-1].argmax())
        new = [*new, token]
    more = session.ask(*TURNS[2], Sampling(max_new_tokens=1)).kept
    assert [images[:-1] for images in more] == first.kept
    assert [len(images[-1]) for images in more] == [8, 3]


def test_crops_are_pictures_of_a_conversation(gemma_crops):
    model = load(gemma_crops, schedule=DropSchedule((2,), (0.5,)))
    session = Session(model)
    session.ask("Hm?", photo(60, 50, 3), Sampling(max_new_tokens=1))
    answer = session.ask("What?", photo(60, 200, 1), Sampling(max_new_tokens=1))
    expected = model.processor.row([*session.turns[:1], ("<image>What?", None)], [photo(60, 50, 3), photo(60, 200, 1)])
    assert [len(image) for image in answer.kept[0]] == [8] * (1 + 4)
    assert answer.stage_lengths[0] == len(expected.ids) + 15 * 5
    assert session.turns[1][0] == "<image>\nWhat?"


PICTURES = [photo(60, 200, 1), photo(50, 50, 2), photo(300, 90, 3)]
MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "text", "text": "First "}, {"type": "image"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "And these?"}]},
]


@pytest.mark.parametrize("crops", [False, True])
def test_messages_are_those_of_transformers(crops, gemma, gemma_crops):
    """A system message, pictures within the text and several of them, with and without crops of the long ones."""
    model = load(gemma_crops if crops else gemma[1])
    batch = model.processor([MESSAGES], [PICTURES])
    inputs = torch_inputs_of(MESSAGES, PICTURES, **(PAN_AND_SCAN if crops else {}))
    image = tiny_gemma.tokenizer().convert_tokens_to_ids("<image_soft_token>")
    ids = np.where(batch.image_id[0] > 0, image, batch.token_ids[0])[: batch.length[0]]
    assert ids.tolist() == inputs["input_ids"][0].tolist()
    theirs = inputs["pixel_values"].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(batch.crops[0, : len(theirs)], theirs)
    assert batch.image_id.max() == len(theirs) == (3 + 3 + 3 if crops else 3)


def test_training_examples_are_prompts_with_their_answers(gemma):
    """The ids of an example are those of the conversation; its labels are the answers up to their end token."""
    processor = load(gemma[1]).processor
    prompts, tokenizer = processor.prompts(), tiny_gemma.tokenizer()
    prompts.check_trainable()
    messages, _ = read_conversation(MESSAGES, PICTURES)
    messages.append(Message("assistant", ("Two more cats.",)))
    (example,) = prompts.tokenize([prompts.training_text(messages)])
    assert example.ids.tolist() == prompts.ids(messages)
    assert (example.ids == IMAGE_PLACEHOLDER).sum() == 3
    targets = [int(i) for i in example.labels if i >= 0]
    assert tokenizer.decode(targets) == "A cat.<end_of_turn>Two more cats.<end_of_turn>"


def test_a_question_that_writes_the_mark_of_a_picture_is_refused(gemma):
    processor = load(gemma[1]).processor
    message = "the conversation has 1 image, but its text by the model's chat template has places for 2: leave"
    with pytest.raises(UserError, match=re.escape(f"{message} <start_of_image> out")):
        processor(["What is <start_of_image>?"], [PICTURES[1]])
