"""Conversations: both ways beside the whole conversation asked in one, and what is compiled, reused and refused."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import BLUE, COMPILED, RED, TOKENIZER

from pdrop_jax.config import LlavaConfig, TextConfig, VisionConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.engine import generate
from pdrop_jax.generation.pretrained import Model, reschedule
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.chat_template import TEMPLATES, render, token_ids
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model.params import abstract_params
from pdrop_jax.schedule import DropSchedule

ONE_DROP = DropSchedule((1,), (0.3,))
TURNS = [("What is it?", RED), ("Say more", None), ("Is <image> the same?", BLUE)]
NEW = 5


@functools.cache
def model(schedule=ONE_DROP):
    config = LlavaConfig(
        VisionConfig(28, 7, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2),  # 16 image tokens
        TextConfig(320, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_length=256),
        schedule,
        template="mistral_instruct",
        eos_token_ids=(1, 2),
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), abstract_params(config))
    return Model(config, params, Processor.load(TOKENIZER, config))


def converse(session, turns=TURNS, **options):
    return [session.ask(question, image, Sampling(**{"max_new_tokens": NEW, **options})) for question, image in turns]


def asked_in_one(session, turn, schedule=ONE_DROP):
    """The conversation of a session up to question ``turn``, asked without one."""
    turns = [*session.turns[:turn], (session.turns[turn][0], None)]
    pictures = [image for _, image in TURNS[: turn + 1] if image is not None]
    return generate(model(schedule), [turns], [pictures], Sampling(NEW))


@functools.cache
def finished(mode, schedule=ONE_DROP):
    session = Session(model(schedule), mode)
    return session, converse(session)


def test_scores_that_need_what_no_cache_keeps():
    for score in ("fastv", "cls"):
        with pytest.raises(UserError, match=f"a conversation cannot use score '{score}'"):
            Session(reschedule(model(), DropSchedule((1,), (0.5,), score=score)))
    Session(reschedule(model(), DropSchedule((1,), (0.5,), score="all_text")))


def test_rerank_answers_as_the_whole_conversation_asked_in_one():
    session, answers = finished("rerank")
    for turn, answer in enumerate(answers):
        whole = asked_in_one(session, turn)
        assert answer.token_ids == whole.token_ids[0]
        assert answer.text == whole.texts[0]
        assert answer.kept == whole.kept[0]
        assert answer.stage_lengths == whole.stage_lengths[0]


def test_without_drops_keep_is_the_whole_conversation_asked_in_one():
    dense = DropSchedule.none()
    session, answers = finished("keep", dense)
    assert answers[-1].token_ids == asked_in_one(session, 2, dense).token_ids[0]
    assert [answer.kept for answer in answers] == [[]] * 3


def test_what_stays_stays_and_a_later_image_is_dropped_by_its_own_question():
    session, (first, second, third) = finished("keep")
    whole = asked_in_one(session, 0)
    assert (first.token_ids, first.kept) == (whole.token_ids[0], whole.kept[0])
    assert second.kept == first.kept
    assert [images[0] for images in third.kept] == [images[0] for images in first.kept]
    assert [len(images[1]) for images in third.kept] == [int(16 * 0.3)]
    text = third.stage_lengths[0] - 2 * 16
    assert third.stage_lengths == [text + 2 * 16, text + 2 * 4]


def test_each_question_chooses_its_own_tokens():
    _, (first, second, _) = finished("rerank")
    assert second.kept != first.kept


def test_only_new_tokens_run():
    for mode in ("keep", "rerank"):
        _, answers = finished(mode)
        prompts = [answer.stage_lengths[0] for answer in answers]
        assert answers[0].cached == 0
        assert all(answer.cached >= before for answer, before in zip(answers[1:], prompts, strict=False))


def words_only():
    """The model with a head that knows two tokens, words of their own: a text of them has no other tokens."""
    vocab = model().processor.tokenizer.get_vocab()
    first, second = [i for word, i in sorted(vocab.items()) if word in ("▁a", "▁the")]
    kernel = np.zeros(model().params["head"]["kernel"].shape, np.float32)
    kernel[:, first] = np.random.default_rng(1).standard_normal(len(kernel))
    kernel[:, second] = -kernel[:, first]
    return dataclasses.replace(model(), params={**model().params, "head": {"kernel": jnp.asarray(kernel)}})


@pytest.mark.parametrize("mode", ["keep", "rerank"])
def test_keep_reuses_the_answer_as_well(mode):
    session = Session(words_only(), mode)
    first, second = converse(session, TURNS[:2])
    answer = NEW - 1 if mode == "keep" else 0  # the last token drawn has not been through the model
    assert second.cached == first.stage_lengths[0] + answer


def test_an_answer_of_tokens_that_its_text_does_not_have_is_run_again():
    """Random tokens: joined to a text they are tokenized otherwise."""
    session, (first, second, _) = finished("keep")
    assert first.stage_lengths[0] <= second.cached < first.stage_lengths[0] + NEW - 1
    text = render([*session.turns[:1], (session.turns[1][0], None)], "mistral_instruct")
    ids = token_ids(model().processor.tokenizer, text)
    assert second.stage_lengths[0] == len(ids) - 1 + 16


@pytest.mark.parametrize("mode", ["keep", "rerank"])
def test_a_second_conversation_compiles_nothing(mode):
    finished(mode)
    before = len(COMPILED)
    assert before > 0
    converse(Session(model(), mode), seed=3)
    assert COMPILED[before:] == []


def test_only_the_growth_of_the_bucket_compiles():
    session = Session(model(), "rerank")
    buckets, compiled = [], []
    for turn in range(8):
        before = len(COMPILED)
        answer = session.ask("Hm?", RED if turn == 0 else None, Sampling(2))
        compiled.append(len(COMPILED) - before)
        text = answer.stage_lengths[0] - 16
        buckets.append(max(32, 1 << (text - 1).bit_length()))
    steady = [now for now, size, last in zip(compiled[2:], buckets[2:], buckets[1:], strict=False) if size == last]
    assert len(steady) > 3
    assert set(steady) == {0}


def test_a_broken_stream_costs_the_cache_and_nothing_else():
    def broken(text):
        raise RuntimeError("the reader left")

    session, _ = finished("keep")
    other = Session(model(), "keep")
    converse(other, TURNS[:1])
    with pytest.raises(RuntimeError, match="the reader left"):
        other.ask("Say more", sampling=Sampling(NEW), stream=broken)
    assert other.turns == session.turns[:1]
    again = other.ask("Say more", sampling=Sampling(NEW))
    assert again.cached == 0
    assert again.token_ids == asked_in_one(session, 1).token_ids[0]


def test_streamed_pieces_are_the_text():
    pieces = []
    session = Session(model(), "rerank")
    answer = session.ask(*TURNS[0], Sampling(NEW), stream=pieces.append)
    assert "".join(pieces) == answer.text == finished("rerank")[1][0].text


def test_a_tag_that_the_model_writes_is_no_picture(monkeypatch):
    session = Session(model(), "keep")
    monkeypatch.setattr(Processor, "decode", lambda self, ids: "an <image> of it")
    converse(session, TURNS[:2])
    assert session.turns[0] == ("<image>\nWhat is it?", "an  of it")


def test_a_tag_within_a_tag_that_the_model_writes_is_no_picture_either(monkeypatch):
    session = Session(model(), "keep")
    monkeypatch.setattr(Processor, "decode", lambda self, ids: "an <im<image>age> of <im<im<image>age>age>it")
    converse(session, TURNS[:2])
    assert session.turns[0] == ("<image>\nWhat is it?", "an  of it")


@pytest.mark.parametrize(
    ("question", "image", "options", "message"),
    [
        ("Is <image> it?", None, {}, "1 <image> tag but 0 pictures"),
        ("Hm?", "nowhere.png", {}, "no such file"),
        (
            "Hm?",
            None,
            {"max_new_tokens": 240},
            r"needs \d+ positions \(\d+ tokens with this question \+ 240 new tokens\)",
        ),
        ("word " * 200, None, {}, r"needs \d+ positions"),
    ],
    ids=["tag", "picture", "answer", "question"],
)
def test_a_mistake_leaves_the_conversation_as_it_was(question, image, options, message):
    session = Session(model(), "keep")
    converse(session, TURNS[:1])
    with pytest.raises(UserError, match=message):
        session.ask(question, image, Sampling(**options))
    (answer,) = converse(session, TURNS[1:2])
    assert answer.cached > 0
    assert answer.token_ids == finished("keep")[1][1].token_ids


def test_a_mode_that_is_not_known():
    with pytest.raises(UserError, match="'keep' or 'rerank', got 'drop'"):
        Session(model(), "drop")


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
def test_a_conversation_begins_with_the_tokens_of_its_earlier_prompts(llama, template):
    """So all of a prompt is found in the cache, whatever stands at the edges; and after it the answer's own tokens."""
    tokenizer, _ = llama
    turns = [("<image>\nWhat is this?", "It is a café."), ("<image> or that?", "Neither, 42."), ("Why?", None)]
    whole = token_ids(tokenizer, render(turns, template))
    for n in (1, 2):
        prompt = token_ids(tokenizer, render([*turns[: n - 1], (turns[n - 1][0], None)], template))
        assert whole[: len(prompt)] == prompt
        if TEMPLATES[template].answer:  # a space stands before an answer, as the tokenizer puts one
            answer = tokenizer(turns[n - 1][1], add_special_tokens=False)["input_ids"]
            assert whole[len(prompt) :][: len(answer)] == answer


# Plain text, in which the tokenizer has no token of a turn; SHIFTING tells the number of messages before all of them,
# and LATE before the last.
OWN = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' }}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SHIFTING = "{{ messages | length }} messages: " + OWN
LATE = OWN.replace("{% for m in messages %}", "{% for m in messages %}{% if loop.last %}{{ 'last: ' }}{% endif %}")


@functools.cache
def model_with(template):
    processor = dataclasses.replace(
        model().processor, config=dataclasses.replace(model().config, template="own"), chat_template=template
    )
    return dataclasses.replace(model(), processor=processor)


def message(role, *contents):
    return {"role": role, "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in contents]}


@pytest.mark.parametrize(("template", "again"), [(OWN, False), (SHIFTING, True), (LATE, False)])
def test_a_session_by_the_models_own_template(template, again):
    """Each turn is the whole conversation asked in one; what a template changes behind the last image runs again."""
    asking = model_with(template)
    session = Session(asking, "rerank")
    for turn, (question, image) in enumerate(TURNS):
        answer = session.ask(question, image, Sampling(NEW))
        turns = [*session.turns[:turn], (session.turns[turn][0], None)]
        pictures = [image for _, image in TURNS[: turn + 1] if image is not None]
        whole = generate(asking, [turns], [pictures], Sampling(NEW))
        assert answer.token_ids == whole.token_ids[0]
        assert answer.kept == whole.kept[0]
        if turn:
            assert (answer.cached < 16) == (again or (template == LATE and turn == 1))


def test_image_tokens_cannot_be_kept_if_what_precedes_them_changes():
    session = Session(model_with(SHIFTING), "keep")
    session.ask(*TURNS[0], Sampling(NEW))
    before = session.turns
    with pytest.raises(
        UserError, match=r'^the chat template writes earlier messages differently .* use mode "rerank"$'
    ):
        session.ask("Say more", sampling=Sampling(NEW))
    assert session.turns == before
    converse(Session(model_with(OWN), "keep"))


def test_a_session_of_messages():
    asking = model_with(OWN)
    start = [
        message("system", "Be brief."),
        message("user", {"type": "image", "image": RED}, "What?"),
        message("assistant", "It."),
        message("user", "Why?"),
    ]
    session = Session(asking, "rerank")
    answer = session.ask(start, sampling=Sampling(NEW))
    assert answer.token_ids == generate(asking, [start], sampling=Sampling(NEW)).token_ids[0]
    assert session.turns == [("<image>\nWhat?", "It."), ("Why?", answer.text)]
    later = session.ask([message("user", "And?")], sampling=Sampling(NEW))
    whole = [*start, message("assistant", answer.text), message("user", "And?")]
    assert later.token_ids == generate(asking, [whole], sampling=Sampling(NEW)).token_ids[0]
    assert later.cached >= answer.stage_lengths[0]
    with pytest.raises(UserError, match=r"^message 8 is a system message: only the first message may be one$"):
        session.ask([message("system", "No."), message("user", "b")])
    with pytest.raises(UserError, match=r"^the last message is from 'assistant'"):
        session.ask([message("user", "a"), message("assistant", "b")])
    assert len(session.turns) == 3


def test_a_second_question_before_the_answer_is_refused():
    """From another thread, or in the stream itself; the conversation then goes on."""
    session, refused = Session(model()), []

    def ask():
        try:
            session.ask("And now?")
        except UserError as error:
            refused.append(str(error))

    def stream(piece):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        ask()

    first = session.ask(*TURNS[0], Sampling(NEW), stream=stream)
    assert len(refused) >= 2
    assert set(refused) == {"this conversation is still answering another question: wait for its answer"}
    expected = finished("rerank")[1]
    assert [first.token_ids, session.ask(*TURNS[1], Sampling(NEW)).token_ids] == [x.token_ids for x in expected[:2]]
