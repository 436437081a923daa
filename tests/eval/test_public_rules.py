"""Scores of random answer files, compared with a second implementation of the public scripts' rules."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrop_jax.eval import scoring
from pdrop_jax.eval.scoring.open_ended import textvqa_question

MANY = settings(max_examples=200, deadline=None)
PIECES = [
    *"ABCDEFZabn.,?!-/';\"_1290 \n\t",
    *("The answer is ", "Yes", "no", "No", "not", "yes", " the ", "two", "none", "dont", "t-shirt", "'s", "1,0", ". "),
    *("3.5", "1,,2", "somebody'd", "let's", "hes", "İ", "é", "\u00a0", "\u2028", "٣.", "I'm", "couldnt've"),
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
SAID = st.one_of(TEXT, st.sampled_from(["Yes", "No", "A", "B", "two dogs", "2 dogs", "a dog."]))


def score_of(benchmark, texts, annotations, prompts=None, ids=None, questions=None):
    """The score of an answer file. ``annotations`` is {file name: content}."""
    ids = range(len(texts)) if ids is None else ids
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = zip(ids, texts, prompts or [""] * len(texts), strict=True)
        rows = [{"question_id": n, "text": text, "prompt": prompt} for n, text, prompt in lines]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for file, content in annotations.items():
            (folder / "ann" / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / "ann" / file).write_text(content if isinstance(content, str) else json.dumps(content))
        target = (
            folder / "ann" / next(iter(annotations)) if benchmark in ("gqa", "textvqa", "vqav2") else folder / "ann"
        )
        if questions is None:
            return getattr(scoring, f"score_{benchmark}")(folder / "a.jsonl", target)
        (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        return scoring.score_pope(folder / "a.jsonl", folder / "q.jsonl", target)


def scienceqa_choice(text):
    """The letter that is the whole text, or precedes a leading ". ", or is the only one in "The answer is _?"."""
    if len(text) == 1 and text in "ABCDE":
        return text
    if len(text) > 2 and text[0] in "ABCDE" and text[1] == "." and text[2] == " ":
        return text[0]
    named = []
    for after in text.split("The answer is ")[1:]:
        if len(after) > 1 and "A" <= after[0] <= "Z" and after[1] != "\n":
            named.append(after[0])
    return named[0] if len(named) == 1 else "FAILED"


@MANY
@given(
    st.lists(
        st.tuples(
            st.one_of(SAID, st.tuples(st.sampled_from(["", "So ", "A. "]), SAID).map("The answer is ".join)),
            st.integers(0, 4),
            st.integers(1, 5),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_scienceqa(rows):
    problems = {str(n): {"answer": truth, "choices": ["x"] * count} for n, (_, truth, count, _) in enumerate(rows)}
    prompts = ["<image>\nWhich?" if image else "Which?" for *_, image in rows]
    files = {"problems.json": problems, "pid_splits.json": {"test": list(problems)}}
    score = score_of("scienceqa", [text for text, *_ in rows], files, prompts)
    right = [truth < count and scienceqa_choice(text) == "ABCDE"[truth] for text, truth, count, _ in rows]
    seen = [hit for hit, (*_, image) in zip(right, rows, strict=True) if image]
    assert score.values["accuracy"] == pytest.approx(sum(right) / len(right))
    assert score.values["image_accuracy"] == pytest.approx(sum(seen) / max(len(seen), 1))


def pope_no(text):
    sentence = text[: text.index(".")] if "." in text else text
    return any(word in ("No", "no", "not") for word in "".join(c for c in sentence if c != ",").split(" "))


@MANY
@given(st.lists(st.tuples(SAID, st.sampled_from(["yes", "no"])), min_size=1, max_size=8))
def test_pope(rows):
    questions = [{"question_id": n, "category": "random", "text": f"Is it {n}?"} for n in range(len(rows))]
    labels = "".join(json.dumps({"text": f"Is it {n}?", "label": label}) + "\n" for n, (_, label) in enumerate(rows))
    score = score_of("pope", [text for text, _ in rows], {"coco_pope_random.json": labels}, questions=questions)
    pairs = [(not pope_no(text), label == "yes") for text, label in rows]
    tp, said, true = pairs.count((True, True)), sum(a for a, _ in pairs), sum(b for _, b in pairs)
    group = score.groups["random"]
    assert group["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert group["yes_ratio"] == pytest.approx(said / len(pairs))
    if tp:  # otherwise the script divides by zero
        assert (group["precision"], group["recall"]) == (pytest.approx(tp / said), pytest.approx(tp / true))
        assert group["f1"] == pytest.approx(2 * tp / (said + true))


@MANY
@given(st.lists(st.tuples(SAID, SAID, st.sampled_from(["query", "verify"]), st.booleans()), min_size=1, max_size=8))
def test_gqa(rows):
    questions = {
        str(n): {"answer": truth, "isBalanced": balanced or n == 0, "types": {"structural": kind}}
        for n, (_, truth, kind, balanced) in enumerate(rows)
    }
    score = score_of("gqa", [text for text, *_ in rows], {"gqa.json": questions})
    right = {"open": [], "binary": []}
    for n, (text, truth, kind, balanced) in enumerate(rows):
        while text.endswith("."):
            text = text[:-1]
        if balanced or n == 0:
            right["open" if kind == "query" else "binary"].append(text.lower() == truth)
    every = right["open"] + right["binary"]
    assert score.values["accuracy"] == pytest.approx(sum(every) / len(every))
    for name, hits in right.items():
        assert score.groups[name]["accuracy"] == pytest.approx(sum(hits) / max(len(hits), 1))


NUMBERS = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {word: max(n - 1, 0) for n, word in enumerate(NUMBERS)}
# The words of VQA's table that PIECES can form.
APOSTROPHES = {"dont": "don't", "hes": "he's", "somebody'd": "somebodyd", "couldnt've": "couldn't've"}


def vqa_words(text, commas_in_a_row):
    """VQA's two steps: punctuation, then digits, articles and contractions."""
    digit_comma_digit = any(
        text[a].isdecimal() and text[b].isdecimal() and set(text[a + 1 : b]) == {","}
        for a in range(len(text))
        for b in range(a + 2, len(text) if commas_in_a_row else min(a + 3, len(text)))
    )
    cleaned = ""
    for c in text:
        if c in ';/[]"{}()=+\\_-><@`,?!':
            beside_a_space = c + " " in text or " " + c in text
            c = "" if beside_a_space or digit_comma_digit else " "
        cleaned += c
    for at in reversed([n for n, c in enumerate(cleaned) if c == "."][:32]):
        if not cleaned[at + 1 : at + 2].isdecimal():
            cleaned = cleaned[:at] + cleaned[at + 1 :]
    words = [str(DIGITS.get(word, word)) for word in cleaned.lower().split()]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


def evalai_words(text):
    text = text.lower().translate({ord(","): None, ord("?"): None}).replace("'s", " 's").strip()
    return vqa_words(" ".join(text.replace("\t", "\n").split("\n")).strip(), commas_in_a_row=True)


def human_agreement(said, truths):
    """Averaged over the annotator left out: a third for each other annotator who agrees, at most 1."""
    shares = [min(3, sum(said == t for m, t in enumerate(truths) if m != n)) / 3 for n in range(len(truths))]
    return sum(shares) / len(shares)


PEOPLE = st.one_of(
    st.lists(SAID, min_size=10, max_size=10),
    st.lists(SAID, min_size=2, max_size=2).map(lambda pair: pair * 5),
    SAID.map(lambda one: [one] * 10),
)


@MANY
@given(st.lists(st.tuples(SAID, PEOPLE), min_size=1, max_size=4), st.booleans())
def test_textvqa(rows, copied):
    rows = [(truths[0] if copied else said, truths) for said, truths in rows]
    data = [{"image_id": str(n), "question": "Why?", "answers": truths} for n, (_, truths) in enumerate(rows)]
    prompts = ["why?\nAnswer briefly."] * len(rows)
    score = score_of("textvqa", [said for said, _ in rows], {"val.json": {"data": data}}, prompts)
    expected = [human_agreement(evalai_words(said), [evalai_words(t) for t in truths]) for said, truths in rows]
    assert score.values["accuracy"] == pytest.approx(sum(expected) / len(expected))


@MANY
@given(st.lists(st.tuples(SAID, PEOPLE), min_size=1, max_size=4), st.booleans())
def test_vqav2(rows, copied):
    rows = [(truths[0] if copied else said, truths) for said, truths in rows]
    records = [
        {"question_id": n, "answer_type": "other", "answers": [{"answer": t, "answer_id": m} for m, t in enumerate(ts)]}
        for n, (_, ts) in enumerate(rows)
    ]
    score = score_of("vqav2", [said for said, _ in rows], {"val.json": {"annotations": records}})
    expected = []
    for said, truths in rows:
        said, truths = evalai_words(said), [" ".join(t.replace("\t", "\n").split("\n")).strip() for t in truths]
        if any(t != truths[0] for t in truths):
            said, *truths = [vqa_words(t, commas_in_a_row=False) for t in (said, *truths)]
        expected.append(human_agreement(said, truths))
    assert score.values["accuracy"] == pytest.approx(sum(expected) / len(expected))


@MANY
@given(TEXT.filter(lambda x: "\n" not in x), TEXT.filter(lambda x: "\n" not in x))
def test_the_question_of_a_textvqa_prompt(question, tokens):
    instruction = "Answer the question using a single word or phrase."
    ocr = f"Reference OCR token: {tokens}"
    assert textvqa_question(f"{ocr}\n{question}\n{instruction}") == question
    assert textvqa_question(f"Hm{question}\n{ocr}\n{instruction}") == f"Hm{question}"
    assert textvqa_question(f"{ocr}\n{instruction}") == ocr  # of two lines the script takes the first


@MANY
@given(st.lists(st.tuples(SAID, SAID, st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_mme(rows):
    files, texts, prompts, ids = {}, [], [], []
    for n, (first, second, *truths) in enumerate(rows):
        asked = zip("ab", truths, strict=True)
        files[f"count/{n}.txt"] = "".join(f"Is it {x}?\t{'Yes' if truth else 'No'}\n" for x, truth in asked)
        texts += [first, second]
        prompts += ["Is it a?", "Is it b?"]
        ids += [f"count/{n}.jpg"] * 2
    score = score_of("mme", texts, files, prompts, ids)

    def right(text, truth):
        start = text.lower()[:4]
        return ("yes" in start) if truth else ("yes" not in start and "no" in start)

    hits = [(right(a, x), right(b, y)) for a, b, x, y in rows]
    single = sum(a + b for a, b in hits) / (2 * len(hits))
    both = sum(a and b for a, b in hits) / len(hits)
    assert score.values["perception"] == pytest.approx(100 * single + 100 * both)
