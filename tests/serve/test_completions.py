"""Answers over HTTP, to OpenAI's own client, are those of the library."""

import concurrent.futures
import json
import re

import jax
import numpy as np
import pytest
from served import GRID, PICTURE, said

from pdrop_jax.generation.sampling import Sampling

ROW, BAGS = "What is in row 3, column 2?", "How many bags are there?"
SCHEMA = {
    "type": "object",
    "properties": {"thing": {"enum": ["bag", "shirt"]}, "count": {"type": "integer", "minimum": 0, "maximum": 12}},
    "required": ["thing", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def ask(client):
    def ask(messages, temperature=0, **options):
        options = {"model": "tiny", **options}
        return client.chat.completions.create(messages=messages, temperature=temperature, **options)

    return ask


def text_of(answer):
    return answer.choices[0].message.content


@pytest.mark.parametrize("budget", ["own", "dense"])
def test_the_answer_and_what_was_dropped_are_the_librarys(ask, generate, models, service, budget):
    expected = generate(ROW, [GRID], budget=budget)
    answer = ask(said(PICTURE, ROW), extra_body={"pdrop": budget, "pdrop_details": True})
    assert text_of(answer) == expected.texts[0]
    prompt, new = expected.stage_lengths[0][0], len(expected.token_ids[0])
    assert answer.usage.to_dict() == {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    pdrop, (view,) = answer.pdrop, answer.pdrop["images"][0]["views"]
    assert pdrop["budget"] == budget
    assert pdrop["schedule"] == models[budget].config.schedule.to_json()
    assert [stage["tokens"] for stage in pdrop["stages"]] == expected.stage_lengths[0]
    assert [stage["image_tokens"] for stage in pdrop["stages"]] == [144, *(len(kept[0]) for kept in expected.kept[0])]
    assert view["kept"] == [list(range(144)), *(kept[0] for kept in expected.kept[0])]
    scores = [np.array(heat, float) for heat in view["scores"]]  # None is NaN
    for found, drop in zip(scores, expected.scores[0], strict=True):
        np.testing.assert_allclose(found, drop[0], atol=1e-6)
    assert (view["rows"], view["columns"]) == (12, 12)
    assert view["picture"].startswith("data:image/jpeg;base64,")
    assert min(pdrop["queue_ms"], pdrop["prefill_ms"], pdrop["decode_ms"]) >= 0
    assert pdrop["cache_bytes"] == service.engines[budget].memory // service.engines[budget].slots


def test_budgets_share_the_weights(models):
    own, dense = ({id(leaf) for leaf in jax.tree.leaves(model.params)} for model in models.values())
    assert own == dense


def test_pieces_of_a_stream_are_the_answer(ask):
    messages = said(PICTURE, ROW)
    whole = ask(messages)
    options = {"stream_options": {"include_usage": True}, "logprobs": True, "extra_body": {"pdrop_details": True}}
    *chunks, last = ask(messages, stream=True, **options)
    choices = [chunk.choices[0] for chunk in chunks]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == text_of(whole)
    assert [choice.finish_reason for choice in choices] == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert len(tokens) == whole.usage.completion_tokens
    assert "".join(token.token for token in tokens).strip() == text_of(whole)
    assert chunks[-1].pdrop["stages"][0]["tokens"] == whole.usage.prompt_tokens
    assert last.choices == []
    assert last.usage == whole.usage


@pytest.mark.parametrize("form", ["images", "frames"])
def test_several_images(ask, generate, form):
    """The model knows no videos: their frames are images."""
    messages = said(PICTURE, PICTURE, BAGS)
    if form == "frames":
        messages[0]["content"][:2] = [{"type": "video", "video": [PICTURE, PICTURE], "fps": 1}]
    expected = generate(BAGS, [GRID, GRID])
    answer = ask(messages, extra_body={"pdrop_details": True})
    assert text_of(answer) == expected.texts[0]
    assert answer.usage.prompt_tokens == expected.stage_lengths[0][0] > 288
    kept = [image["views"][0]["kept"][1:] for image in answer.pdrop["images"]]
    assert kept == [[at[number] for at in expected.kept[0]] for number in (0, 1)]


def test_each_of_n_answers_has_a_seed_of_its_own(ask, generate):
    options = {"temperature": 2.0, "top_p": 0.9, "seed": 7, "max_tokens": 8}
    answer = ask(said(BAGS), n=3, extra_body={"top_k": 50}, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    found = [choice.message.content for choice in answer.choices]
    for number, text in enumerate(found):
        assert text == generate(BAGS, sampling=Sampling(8, 2.0, 50, 0.9, 7 + number)).texts[0]
    assert len(set(found)) > 1
    streamed = ["", "", ""]
    for chunk in ask(said(BAGS), n=3, stream=True, extra_body={"top_k": 50}, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == found


def test_an_answer_ends_in_front_of_a_stop_string(ask):
    options = {"temperature": 2.0, "seed": 3}
    whole = text_of(ask(said(BAGS), **options))
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    answer = ask(said(BAGS), stop=["not in it", stop], **options)
    assert text_of(answer) == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = ask(said(BAGS), stop=stop, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(answer)


def test_fewer_tokens_end_an_answer_by_its_length(ask):
    answer = ask(said(BAGS), max_completion_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_log_probabilities_are_of_the_librarys_logits(ask, generate, service):
    expected = generate(ROW, [GRID])
    logprobs = np.asarray(jax.nn.log_softmax(expected.first_logits[0]))
    # Neither the temperature nor top_k changes them.
    answer = ask(said(PICTURE, ROW), temperature=0.1, logprobs=True, top_logprobs=20, extra_body={"top_k": 1})
    first, *_ = answer.choices[0].logprobs.content
    order = np.argsort(-logprobs)[:20]
    np.testing.assert_allclose([other.logprob for other in first.top_logprobs], logprobs[order], atol=1e-4)
    assert first.token.encode() == bytes(first.bytes) == service.token_bytes[expected.token_ids[0][0]]
    np.testing.assert_allclose(first.logprob, logprobs[expected.token_ids[0][0]], atol=1e-4)
    assert first.top_logprobs[0].token == first.token
    bare = ask(said(PICTURE, ROW), logprobs=True).choices[0].logprobs.content
    assert [token.top_logprobs for token in bare] == [[]] * answer.usage.completion_tokens
    assert [token.logprob for token in bare] == [token.logprob for token in answer.choices[0].logprobs.content]


def test_json_follows_its_schema(ask):
    form = {"type": "json_schema", "json_schema": {"name": "what", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer = ask(said(PICTURE, ROW), temperature=2.0, seed=seed, response_format=form)
        found = json.loads(text_of(answer))
        assert found.keys() == {"thing", "count"}
        assert found["thing"] in SCHEMA["properties"]["thing"]["enum"]
        assert found["count"] in range(13)
        assert answer.choices[0].finish_reason == "stop"
    opened = ask(said(PICTURE, ROW), response_format={"type": "json_object"}, max_tokens=3)
    assert text_of(opened).startswith("{")


def test_constrained_and_free_answers_share_a_batch(ask, service):
    pattern, requested = r"(bag|shirt|T-shirt) [0-9]{3}", service.stats.requested
    alone = [text_of(ask(said(BAGS), temperature=1.5, seed=seed)) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        free = [pool.submit(ask, said(BAGS), temperature=1.5, seed=seed) for seed in range(4)]
        bound = [
            pool.submit(ask, said(BAGS), temperature=1.5, seed=seed, extra_body={"regex": pattern}) for seed in range(4)
        ]
        assert [text_of(answer.result()) for answer in free] == alone
        assert all(re.fullmatch(pattern, text_of(answer.result())) for answer in bound)
    assert service.stats.requested == requested  # nothing is compiled
