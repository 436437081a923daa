"""Messages in OpenAI's and Hugging Face's form: what is read, which image belongs where, and what is refused."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pdrop_jax.errors import UserError
from pdrop_jax.inputs.images import Video, open_image
from pdrop_jax.inputs.messages import Medium, Message, read_conversation

RED, BLUE = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 30), "blue")
IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def user(*contents):
    return {"role": "user", "content": list(contents)}


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def test_one_form_for_all():
    question = Message("user", (Medium(), "What?"))
    assert read_conversation("What?", [RED]) == ([question], [RED])
    assert read_conversation([user(IMAGE, text("What?"))], [RED]) == ([question], [RED])
    assert read_conversation([{"role": "user", "content": "What?"}], [RED])[0] == [question]
    messages = [
        {"role": "system", "content": "Be brief."},
        user(text("a "), IMAGE, text(" b")),
        {"role": "assistant", "content": [text("c")], "name": "it"},
        user(text("d <image>")),
    ]
    assert read_conversation(messages, [RED, BLUE]) == (
        [
            Message("system", ("Be brief.",)),
            Message("user", ("a ", Medium(), " b")),
            Message("assistant", ("c",)),
            Message("user", ("d ", Medium(inline=True))),
        ],
        [RED, BLUE],
    )
    assert Message("user", ("a ", Medium(), " b", Medium(inline=True))).text == "<image>\na  b<image>"


def test_images_inside_messages(tmp_path):
    path = tmp_path / "a b.png"
    RED.save(path)
    array, url = np.full((3, 4, 3), 7, np.uint8), f"data:image/png;base64,{png(RED)}"
    contents = [
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": str(path)},
        IMAGE | {"url": path.as_uri()},
        IMAGE | {"path": path},
        IMAGE | {"image": RED},
        IMAGE | {"base64": png(RED)},
        IMAGE | {"url": None, "image": array},
        IMAGE,
        {"type": "video", "video": [RED, str(path)]},
    ]
    (message,), images = read_conversation([user(*contents, text("<image>?"))], [BLUE, Video([BLUE])])
    assert message.parts == (*[Medium()] * 8, Medium("video"), Medium("video", inline=True), "?")
    assert all(np.array_equal(open_image(image), RED) for image in images[:6])
    assert images[6] is array
    assert images[7] is BLUE
    assert images[8:] == [Video([RED, str(path)]), Video([BLUE])]
    assert read_conversation([message], images) == ([message], images)  # what was read is a prompt too


QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ([], [], "^a conversation needs at least one question, got none$"),
        (QUESTION, [], "got a single message: put it in a list$"),
        (5, [], "^a prompt is a question or a list of messages, got a int$"),
        ([QUESTION, "b"], [], "^message 2 is a str: expected an object with role and content$"),
        (["role", "content"], [], "^entry 1 of a conversation is a str: expected messages"),
        ([("a", 5)], [], "^turn 1 is not a question and an answer, which are text$"),
        ([("a", None), ("b", None)], [], "^turn 1 of 2 has no answer: only the last one may lack it$"),
        (
            [{"role": "tool", "content": "a"}],
            [],
            "^message 1 has role 'tool': expected one of system, user, assistant$",
        ),
        ([{"content": "a"}], [], "^message 1 has role None"),
        ([{"role": "user"}], [], "^message 1 has NoneType as content"),
        ([user()], [], "^message 1 has an empty list as content"),
        ([user("a")], [], "^content 1 of message 1 has the form of a str: expected an object"),
        (
            [user({"type": "audio"})],
            [],
            "^content 1 of message 1 has type 'audio': .* one of text, image, image_url, v",
        ),
        ([user({"type": "text", "text": 5})], [], "^content 1 of message 1 has no text$"),
        ([user({"type": "image_url", "image_url": {}})], [], "^content 1 of message 1 has no URL"),
        ([user({"type": "video", "video": "a.mp4"})], [], "a video that is not given as its frames"),
        ([user(IMAGE | {"url": "a", "path": "b"})], [], "has more than one image: url, path$"),
        ([user(IMAGE | {"image": 5})], [], "has a int for an image: expected a path, a URL or an image$"),
        (
            [user(IMAGE | {"url": "http://127.0.0.1/a.png"})],
            [],
            "^content 1 of message 1, http://127.0.0.1/a.png, is at an address that is not public$",
        ),
        (
            [user(IMAGE | {"url": "data:image/png,abc"})],
            [],
            "a data: URL that is not of the form data:image/png;base64",
        ),
        ([user(IMAGE | {"base64": "%%"})], [], "has an image that is not valid base64$"),
        ([user(IMAGE | {"base64": "aaaa"})], [], "^the image in content 1 of message 1: cannot be read as a picture"),
        ([QUESTION, SYSTEM, QUESTION], [], "^message 2 is a system message: only the first message may be one$"),
        ([SYSTEM], [], "^the last message is from 'system', expected 'user'"),
        ([QUESTION, ANSWER], [], "^the last message is from 'assistant', expected 'user': end with the question"),
        ([ANSWER, QUESTION], [], "^message 1 is from 'assistant', expected 'user'"),
        ([QUESTION, QUESTION], [], "^message 2 is from 'user', expected 'assistant': questions and answers alternate"),
        ([user(IMAGE)], [], "^the messages leave 1 image to be given, but there are 0 pictures$"),
        ([user(IMAGE | {"image": RED})], [BLUE], "^the messages leave 0 images to be given, but there are 1 picture$"),
        ([user(IMAGE, text("<image>"))], [RED], "^the messages leave 2 images to be given, but there are 1 picture$"),
        (
            [user(text("<image>"))],
            [RED, RED],
            "^the prompt has 1 <image> tag but 2 pictures: give one picture for each",
        ),
    ],
)
def test_malformed_conversations(prompt, images, message):
    with pytest.raises(UserError, match=message) as error:
        read_conversation(prompt, images)
    assert "\n" not in str(error.value)
