"""Scores of small answer files, each worked out by hand next to it."""

import json

import pytest

from pdrop_jax.errors import UserError
from pdrop_jax.eval import scoring
from pdrop_jax.eval.scoring.choices import chosen_letter
from pdrop_jax.eval.scoring.normalise import evalai, without_punctuation
from pdrop_jax.eval.scoring.open_ended import soft_accuracy, textvqa_question
from pdrop_jax.eval.scoring.yes_no import mme_word, says_yes


def write(path, data):
    """JSON lines of a list for a .jsonl, else one JSON value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in data) if lines else json.dumps(data))
    return path


def answers(folder, *rows):
    """An answer file of (id, text) or (id, text, prompt)."""
    rows = [(*row, "")[:3] for row in rows]
    lines = [{"question_id": name, "text": text, "prompt": prompt} for name, text, prompt in rows]
    return write(folder / "a.jsonl", lines)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Answer", "answer"),
        ("two", "2"),
        ("none", "0"),
        ("Eleven dogs.", "eleven dogs"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("e.g. this", "eg this"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("ows'at", "ows'at"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("a man's hat", "man 's hat"),
        ("t-shirt", "t shirt"),
        ("red - blue", "red blue"),  # a mark next to a space is removed
        ("t-shirt - blue", "tshirt blue"),  # and then everywhere
        ("yes?!", "yes"),
        ("what, why?", "what why"),
        ("left/right", "left right"),
        ("a\nb\tc", "b c"),
        ("  ", ""),
    ],
)
def test_evalai(text, normalised):
    assert evalai(text) == normalised


def test_a_comma_between_digits_takes_every_mark_along():
    assert without_punctuation("1,000-2") == "10002"
    assert without_punctuation("1-2") == "1 2"
    assert without_punctuation("." * 40) == "." * 8  # the original removes 32


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_of_ten_people(matches, accuracy):
    # With m matches: leaving a match out leaves m - 1, leaving another out leaves m. m = 2: (2 * 1/3 + 8 * 2/3) / 10.
    assert soft_accuracy("x", ["x"] * matches + ["y"] * (10 - matches)) == pytest.approx(accuracy)


def test_textvqa_by_picture_and_question(tmp_path):
    data = [
        {"image_id": "p", "question": "What BRAND?", "answers": ["Nokia"] * 2 + ["nokia."] + ["the phone"] * 7},
        {"image_id": "p", "question": "how many?", "answers": ["2"] * 3 + ["two", "3"] + ["4"] * 5},
        {"image_id": "r", "question": "what year?", "answers": ["1,999"] + ["2000"] * 9},
    ]
    annotations = write(tmp_path / "val.json", {"data": data})
    end = "\nAnswer the question using a single word or phrase."
    found = answers(
        tmp_path,
        ("r", "1999", "what year?\nReference OCR token: 1, 999" + end),  # 1 of 10: 0.3
        ("p", "Two.", "how many?" + end),  # 4 of 10: 1
        ("p", "NOKIA", "What brand?" + end),  # 3 of 10: 0.9
    )
    score = scoring.score_textvqa(found, annotations)
    assert score.answers == 3
    assert score.values == {"accuracy": pytest.approx((0.3 + 1 + 0.9) / 3)}


@pytest.mark.parametrize(
    "prompt",
    [
        "Why?",
        "Why?\nAnswer briefly.",
        "Why?\nReference OCR token: a\nAnswer briefly.",
        "Reference OCR token: a\nWhy?\nAnswer briefly.",
        "OCR tokens: a, b. Question: Why? Short answer:",
    ],
)
def test_the_question_in_a_prompt_of_textvqa(prompt):
    assert textvqa_question(prompt) == "Why?"


def test_vqav2_normalises_truths_only_where_people_disagree(tmp_path):
    def question(number, kind, *truths):
        people = [{"answer": truth, "answer_id": n} for n, truth in enumerate(truths)]
        return {"question_id": number, "answer_type": kind, "answers": people}

    records = [
        question(1, "yes/no", *["yes"] * 10),
        question(2, "other", *["t-shirt"] * 2, *["T shirt"] * 2, *["coat"] * 6),  # all four are "t shirt": 1
        question(3, "other", *["t-shirt"] * 10),  # unanimous, so it is not normalised, and "t shirt" differs: 0
        question(4, "number", *["two"] * 2, *["3"] * 8),  # 0.6
    ]
    annotations = write(tmp_path / "val.json", {"annotations": records})
    found = answers(tmp_path, (1, "Yes."), (2, "T-shirt"), (3, "T-shirt"), (4, "2"))
    score = scoring.score_vqav2(found, annotations)
    assert score.values == {"accuracy": pytest.approx(2.6 / 4)}
    assert {name: group["accuracy"] for name, group in score.groups.items()} == pytest.approx(
        {"number": 0.6, "other": 0.5, "yes/no": 1}
    )


def test_gqa_compares_lower_case_without_a_full_stop(tmp_path):
    def question(truth, structure, balanced=True):
        return {"answer": truth, "isBalanced": balanced, "types": {"structural": structure}}

    questions = {
        "1": question("yes", "verify"),
        "2": question("left", "choose"),
        "3": question("dog", "query"),
        "4": question("cat", "query"),
        "5": question("cat", "query", balanced=False),
    }
    annotations = write(tmp_path / "gqa.json", questions)
    found = answers(tmp_path, ("1", "Yes."), ("2", "the left"), ("3", "Dog"), (4, "cats"), ("5", "cow"))
    score = scoring.score_gqa(found, annotations)
    assert (score.answers, score.values) == (4, {"accuracy": 0.5})
    assert score.groups == {"binary": {"accuracy": 0.5, "answers": 2}, "open": {"accuracy": 0.5, "answers": 2}}


@pytest.mark.parametrize(
    ("text", "yes"),
    {
        "Yes": True,
        "No": False,
        "No, there is": False,
        "Nothing": True,
        "There is not. Yes": False,
        "Yes. There is no dog": True,
        "NO": True,
        "It is, no doubt": False,
        "": True,
    }.items(),
)
def test_how_pope_reads_an_answer(text, yes):
    assert says_yes(text) == yes


def pope(folder, texts):
    """Six questions in two categories that alternate in the question file."""
    labels = ("yes", "yes", "no", "no", "yes", "no")
    rows = [(n, ("random", "popular")[n % 2], f"Is there a {n}?") for n in range(6)]
    lines = [{"question_id": n, "category": kind, "text": f"{text}\nAnswer."} for n, kind, text in rows]
    for category in ("random", "popular"):
        its = [(text, label) for (_, kind, text), label in zip(rows, labels, strict=True) if kind == category]
        # JSON lines, although the file is called .json
        text = "".join(json.dumps({"question_id": 1, "text": t, "label": label}) + "\n" for t, label in its)
        write(folder / "pope" / f"coco_pope_{category}.json", 0).write_text(text)
    return answers(folder, *enumerate(texts)), write(folder / "q.jsonl", lines), folder / "pope"


def test_pope_by_category(tmp_path):
    # random: 0, 2, 4 are yes, no, yes; said yes, yes, no: one hit, one false alarm, one miss
    # popular: 1, 3, 5 are yes, no, no; said yes, no, no
    score = scoring.score_pope(*pope(tmp_path, ["Yes", "yes.", "Yes", "No", "No", "not"]))
    third = pytest.approx(1 / 3)
    assert score.groups["random"] == {
        "accuracy": third, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": pytest.approx(2 / 3), "answers": 3,
    }  # fmt: skip
    assert score.groups["popular"] == {
        "accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": third, "answers": 3,
    }  # fmt: skip
    assert score.values == {"accuracy": pytest.approx(2 / 3), "f1": 0.75}


def test_pope_of_a_model_that_never_says_yes(tmp_path):
    score = scoring.score_pope(*pope(tmp_path, ["No"] * 6))
    assert score.groups["popular"]["precision"] == score.groups["popular"]["f1"] == 0
    assert score.groups["popular"]["accuracy"] == pytest.approx(2 / 3)


def test_pope_of_another_version_is_named(tmp_path):
    found, questions, folder = pope(tmp_path, ["No"] * 6)
    path = folder / "coco_pope_random.json"
    path.write_text(path.read_text().replace("a 2?", "a 7?"))
    with pytest.raises(UserError, match=r"line 3 asks another question than .*random.json line 2"):
        scoring.score_pope(found, questions, folder)
    path.write_text("")
    with pytest.raises(UserError, match="has 0 labels for 3 questions"):
        scoring.score_pope(found, questions, folder)


@pytest.mark.parametrize(
    ("text", "letter"),
    {
        "B": "B",
        " C": None,
        "C\n": None,
        "B. because": "B",
        "B.": None,
        "B) so": None,
        "F": None,
        "b": None,
        "The answer is D": None,
        "The answer is D.": "D",
        "The answer is D\n": None,
        "The answer is D!": "D",
        "The answer is F.": "F",
        "The answer is A or The answer is B.": None,
        "The answer is A. The answer is A.": None,
        "So the answer is B.": None,
        "A\nbecause": None,
        "AB": None,
        "": None,
    }.items(),
)
def test_the_letter_of_an_answer(text, letter):
    assert chosen_letter(text) == letter


def test_scienceqa_and_its_part_with_pictures(tmp_path):
    problems = {str(n): {"answer": n % 3, "choices": ["x", "y", "z"]} for n in range(4)} | {
        "9": {"answer": 0, "choices": ["x"]}
    }
    write(tmp_path / "sqa" / "problems.json", problems)
    write(tmp_path / "sqa" / "pid_splits.json", {"test": ["0", "1", "2", "3"], "val": ["9"]})
    found = answers(
        tmp_path,
        ("0", "A", "<image>\nWhich?"),
        ("1", "C. z", "<image>\nWhich?"),
        ("2", "The answer is C.", "Which?"),
        ("3", "I think A", "Which?"),
    )
    score = scoring.score_scienceqa(found, tmp_path / "sqa")
    assert score.values == {"accuracy": 0.5, "image_accuracy": 0.5}
    assert score.groups == {"with image": {"answers": 2}}
    beyond_the_choices = scoring.score_scienceqa(answers(tmp_path, ("9", "B")), tmp_path / "sqa", "val")
    assert beyond_the_choices.values["accuracy"] == 0
    with pytest.raises(UserError, match="has no 'dev'"):
        scoring.score_scienceqa(found, tmp_path / "sqa", "dev")


@pytest.mark.parametrize(
    ("text", "word"),
    {
        "Yes": "yes",
        "No.": "no",
        "Yes, no": "yes",
        "I do not": "other",
        " yes": "yes",
        "not": "no",
        "Noyes": "no",
        "": "other",
    }.items(),
)
def test_how_mme_reads_an_answer(text, word):
    assert mme_word(text) == word


def test_mme_by_task(tmp_path):
    ask, short = " Please answer yes or no.", "\nAnswer the question using a single word or phrase."
    tasks = tmp_path / "mme"
    files = {
        "existence/1.txt": f"Is it a dog?{ask}\tYes\nIs it a cat? {ask}\tNo\n",
        "existence/2.txt": f"Is it a cow?{ask}\tYes\nIs it a cat?{ask}\tNo\n",
        "OCR/questions_answers_YN/7.txt": f"Does it say a?{ask}\tYes\nDoes it say b?{ask}\tNo",
        "code_reasoning/3.txt": f"Is it 1?{ask}\tYes\nIs it 2?{ask}\tNo\n",
        "eval_tool/readme.txt": "nothing of MME",
    }
    for name, text in files.items():
        (tasks / name).parent.mkdir(parents=True, exist_ok=True)
        (tasks / name).write_text(text)
    found = answers(
        tmp_path,
        ("existence/1.jpg", "Yes", f"Is it a dog?{ask}{short}"),
        ("existence/1.jpg", "no", f"Is it a cat?{ask}{short}"),
        ("existence/2.jpg", "Yes", f"Is it a cow?{short}"),
        ("existence/2.jpg", "Yes", f"Is it a cat?{short}"),
        ("OCR/images/7.jpg", "Yes", f"Does it say a?{ask}{short}"),
        ("OCR/images/7.jpg", "No", f"Does it say b?{ask}{short}"),
        ("code_reasoning/3.png", "maybe", f"Is it 1?{ask}{short}"),
        ("code_reasoning/3.png", "No", f"Is it 2?{ask}{short}"),
    )
    score = scoring.score_mme(found, tasks)
    assert score.groups["existence"] == {"score": 125, "acc": 0.75, "acc_plus": 0.5}
    assert score.groups["OCR"] == {"score": 200, "acc": 1, "acc_plus": 1}
    assert score.groups["code_reasoning"] == {"score": 50, "acc": 0.5, "acc_plus": 0}
    assert score.values == {"perception": 325, "cognition": 50}


def gqa(folder, *rows):
    questions = {str(n): {"answer": "x", "isBalanced": True, "types": {"structural": "query"}} for n in range(6)}
    return scoring.score_gqa(answers(folder, *rows), write(folder / "gqa.json", questions))


def test_missing_surplus_and_doubled_answers_are_counted_and_named(tmp_path):
    with pytest.raises(
        UserError, match=r"has 3 answers for 6 questions \(4 missing: 2, 3, 4, …; 1 unexpected or duplicated: 9\): pass"
    ):
        gqa(tmp_path, (0, ""), (1, ""), (9, ""))
    with pytest.raises(UserError, match=r"has 7 answers for 6 questions \(1 unexpected or duplicated: 3\)"):
        gqa(tmp_path, *((n, "") for n in (0, 1, 2, 3, 4, 5, 3)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question_id": 1, "text": "a"}\n{"question_id"', "line 2 is malformed"),
        ('{"question_id": 1}', "line 1 has no 'text'"),
        ('{"text": "a"}', "line 1 has no 'question_id'"),
        ("", "has no answers"),
    ],
)
def test_malformed_answers_name_the_line(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(UserError, match=words):
        scoring.score_gqa(tmp_path / "a.jsonl", write(tmp_path / "gqa.json", {}))


@pytest.mark.parametrize("data", [[], {"data": [3]}, {"annotations": {}}, {"data": [{"image_id": "p"}]}])
def test_malformed_annotations(tmp_path, data):
    path = write(tmp_path / "x.json", data)
    for score in (scoring.score_textvqa, scoring.score_vqav2):
        with pytest.raises(UserError, match=r"x.json .*(malformed|has no|answers for)"):
            score(answers(tmp_path, (1, "a")), path)
