"""What reaches a terminal."""

import json
import pickle
import sys

import pytest

from pdrop_jax.checkpoint import check_shapes
from pdrop_jax.errors import UserError, error_text, exit_on_error, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model/größe 大 😀 \u00a0 é", "model/größe 大 😀 \u00a0 é"),
        ("\x1b[31mred", "\\u001b[31mred"),
        ("a\rb\nc\td", "a\\rb\\nc\\td"),
        ("\x00\x07\x7f\x9b", "\\u0000\\u0007\\u007f\\u009b"),
        ("a\u202egnp.exe\u202c\u2066\u2069\u2028", "a\\u202egnp.exe\\u202c\\u2066\\u2069\\u2028"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_control_characters_are_shown(text, expected):
    assert printable(text) == expected
    assert json.loads(f'"{expected}"') == text


def test_an_answer_keeps_its_lines():
    assert printable("a\n\tb\x1b\r", keep="\n\t") == "a\n\tb\\u001b\\r"


def test_a_document_stays_the_same():
    answer = {"text": "\x9b31m\u202e\x7f\n\x1b"}
    shown = printable(json.dumps(answer, ensure_ascii=False))
    assert json.loads(shown) == answer
    assert shown.isascii()


def test_a_line_is_one_line_and_a_list_stays_a_list(capsys):
    forged = UserError("no file a\npdrop: all is well\x1b[2J")
    assert error_text(forged) == "no file a\\npdrop: all is well\\u001b[2J"
    with pytest.raises(UserError) as caught:
        check_shapes({"a": (1,), "b\n\x1b": (2,)}, {}, "they do not fit")
    assert (
        str(caught.value)
        == "they do not fit: 2 missing, 0 unexpected, 0 of another shape\n  missing: a [1]\n  missing: b\n\x1b [2]"
    )
    with pytest.raises(SystemExit), exit_on_error("pdrop: "):
        raise pickle.loads(pickle.dumps(caught.value))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "pdrop: they do not fit: 2 missing, 0 unexpected, 0 of another shape",
        "  missing: a [1]",
        "  missing: b\\n\\u001b [2]",
    ]


def test_of_an_operating_system_too(capsys):
    with pytest.raises(SystemExit) as end, exit_on_error("pdrop: "), open("/nowhere/\x1b[2J\n"):
        pass
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line
    assert sys.exc_info() == (None, None, None)
