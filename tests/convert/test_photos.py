"""LLaVA-NeXT and OneVision from a real photo to the answer, each beside its own processor and class of transformers."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from PIL import Image
from tiny_torch import GOLDEN, byte_tokenizer, tiny_llava
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

import pdrop_jax
from pdrop_jax import checkpoint
from pdrop_jax.batch import IGNORE
from pdrop_jax.convert.importer import convert
from pdrop_jax.convert.names import NAMINGS, leaves
from pdrop_jax.inputs.conversation import render
from pdrop_jax.inputs.processor import assemble, choose_bucket
from pdrop_jax.model.llava import _pick, forward
from pdrop_jax.model.loss import loss_of
from pdrop_jax.model.vision import image_features
from pdrop_jax.schedule import DropSchedule

PHOTOS = ("img_china_small.png", "img_flower_tall_small.png", "img_astronaut_square_small.png")
MODELS = {
    "llava_next, vicuna": ("llava_next", {"num_key_value_heads": 4}),
    "llava_next, mistral": ("llava_next", {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}),
    "llava_next, mistral with a window": (
        "llava_next",
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 20},
    ),
    "llava_next, llama 3": (
        "llava_next",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "llava_onevision, qwen2": (
        "llava_onevision",
        {"model_type": "qwen2", "num_key_value_heads": 2, "siglip": True, "tie_word_embeddings": True},
    ),
}
NEW_TOKENS = 6


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory):
    """The torch model, its processor, and what ours is after conversion."""
    kind, text = MODELS[request.param]
    folder: pathlib.Path = tmp_path_factory.mktemp("family")
    tokenizer = byte_tokenizer()
    model = tiny_llava(kind=kind, vocab_size=len(tokenizer), image_token_index=len(tokenizer) - 1, **text)
    settings = {"image_grid_pinpoints": model.config.image_grid_pinpoints}
    if kind == "llava_next":
        square = {"height": 28, "width": 28}
        images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=square, **settings)
        processor = transformers.LlavaNextProcessor(
            images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    else:
        images = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, **settings)
        processor = OnevisionProcessor(images, tokenizer, model)
    model.save_pretrained(folder / "hf")
    images.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "ours", schedule=DropSchedule((1, 2), (0.5, 0.25)))
    return model, processor, folder / "ours"


class OnevisionProcessor:
    """In place of transformers' own, which needs torchvision: its image processor, and tokens as many as features."""

    def __init__(self, images, tokenizer, model):
        self.images, self.tokenizer, self.model = images, tokenizer, model

    def __call__(self, text, images, **kwargs):
        found = self.images([images], **kwargs)
        with torch.no_grad():
            features = self.model.get_image_features(**found).pooler_output
        for tokens in features:
            text = text.replace("<image>", "<img>" * len(tokens), 1)
        return transformers.BatchFeature({**self.tokenizer(text.replace("<img>", "<image>"), **kwargs), **found})


def photo(name):
    return Image.open(GOLDEN / name).convert("RGB")


def theirs_of(processor, template, question, images):
    text = render([("<image>\n" * len(images) + question, None)], template)
    return processor(text=text, images=images, return_tensors="pt")


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for n, family in enumerate(MODELS) for name in (PHOTOS if n in (0, 4) else PHOTOS[1:2])],
    indirect=["family"],
    scope="module",
)
def test_from_the_photo_to_the_answer(family, name):
    model, processor, folder = family
    ours = pdrop_jax.load(folder, DropSchedule.none())
    theirs = theirs_of(processor, ours.config.template, "What is this?", [photo(name)])
    batch = ours.processor(["What is this?"], [photo(name)], max_new_tokens=NEW_TOKENS)
    n, is_image = int(batch.length[0]), batch.image_id[0] > 0
    ids = theirs["input_ids"][0].numpy()
    np.testing.assert_array_equal(ids == ours.config.image_token_id, is_image[:n])
    np.testing.assert_array_equal(ids[~is_image[:n]], batch.token_ids[0, :n][~is_image[:n]])
    pixels = theirs["pixel_values"][0].numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(batch.crops[0, : len(pixels)], pixels, atol=1e-6)

    with torch.no_grad():
        features = model.get_image_features(theirs["pixel_values"], theirs["image_sizes"]).pooler_output[0].numpy()
        logits = model(**theirs).logits[0].numpy()
        new = model.generate(**theirs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, len(ids) :].numpy()
    pool, _ = jax.jit(image_features, static_argnums=0)(ours.config, ours.params, batch.crops)
    found = np.asarray(_pick(pool, batch.feature_index, batch.feature_weight)[0])[is_image]
    np.testing.assert_allclose(found, features, rtol=1e-5, atol=1e-5 * np.abs(features).max())
    output = jax.jit(forward, static_argnums=0)(ours.config, ours.params, batch)
    np.testing.assert_allclose(output.logits[0, :n], logits, atol=1e-4)
    answer = pdrop_jax.generate(ours, ["What is this?"], [photo(name)], max_new_tokens=NEW_TOKENS)
    stops = [i for i in range(len(new)) if new[i] in ours.processor.stop_ids]
    assert answer.token_ids[0] == new[: stops[0] if stops else None].tolist()


def test_several_photos_each_dropped_by_its_own_count(family):
    """The dense features of two photos are torch's; the drop then keeps half and a quarter of each."""
    model, processor, folder = family
    ours = pdrop_jax.load(folder)
    images = [photo(name) for name in PHOTOS[:2]]
    theirs = theirs_of(processor, ours.config.template, "Which?", images)
    batch = ours.processor(["Which?"], [images])
    n, is_image = int(batch.length[0]), batch.image_id[0] > 0
    np.testing.assert_array_equal(theirs["input_ids"][0].numpy() == ours.config.image_token_id, is_image[:n])
    more = {"batch_num_images": theirs["batch_num_images"]} if "batch_num_images" in theirs else {}
    with torch.no_grad():
        features = model.get_image_features(theirs["pixel_values"], theirs["image_sizes"], **more).pooler_output
    pool, _ = jax.jit(image_features, static_argnums=0)(ours.config, ours.params, batch.crops)
    found = np.asarray(_pick(pool, batch.feature_index, batch.feature_weight)[0])[is_image]
    expected = torch.cat(list(features)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    answer = pdrop_jax.generate(ours, ["Which?"], [images], max_new_tokens=1)
    counts = answer.image_tokens[0]
    assert counts == [len(x) for x in features]
    assert [[len(kept) for kept in boundary] for boundary in answer.kept[0]] == [
        [int(count * ratio) for count in counts] for ratio in (0.5, 0.25)
    ]


def test_the_gradient_of_every_part(family):
    """Dense, of an answer about a photo: newline vector and tower too."""
    model, processor, folder = family
    config, params = checkpoint.load(folder, schedule=DropSchedule.none())
    ours = pdrop_jax.load(folder, DropSchedule.none()).processor
    theirs = theirs_of(processor, config.template, "What is this?", [photo(PHOTOS[1])])
    ids = theirs["input_ids"][0]
    labels = torch.where(torch.arange(len(ids)) >= len(ids) - 5, ids, -100)
    model.zero_grad()
    loss = model(**theirs, labels=labels[None]).loss
    loss.backward()

    row = ours.row("What is this?", [photo(PHOTOS[1])])
    row = dataclasses.replace(row, labels=[*[IGNORE] * (len(row.ids) - 5), *row.ids[-5:]])
    batch = assemble([row], config, choose_bucket([row], config))
    mean = jax.jit(jax.value_and_grad(lambda params: loss_of(config, params, batch)[0] / 5))
    found, gradient = mean(params)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    arrays = flatten_dict(jax.device_get(gradient), sep=".")
    own = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    compared = set()
    for leaf in leaves(config, NAMINGS["hf-5-modules"]):
        parts = arrays[leaf.path] if leaf.stacked else [arrays[leaf.path]]
        for name, part in zip(leaf.names, parts, strict=True):
            expected = own[name]
            np.testing.assert_allclose(
                leaf.transform.to_torch(part), expected, atol=1e-4 * np.abs(expected).max() + 1e-6, err_msg=name
            )
            compared.add(name)
    assert compared == own.keys()


@pytest.mark.parametrize("family", ["llava_onevision, qwen2"], indirect=True)
def test_a_video(family):
    """Three frames: features and logits are torch's; the clip is dropped by one count."""
    model, _, folder = family
    model.config.video_token_id = model.config.image_token_id - 1  # "<video>"
    ours = pdrop_jax.load(folder, DropSchedule.none())
    video = pdrop_jax.Video([photo(name) for name in PHOTOS])
    batch = ours.processor(["What happens?"], [video])
    n, is_image = int(batch.length[0]), batch.image_id[0] > 0
    assert is_image.sum() == 3 * 1 + 1  # a frame's four features become one
    assert batch.crops.shape[1] == 4  # frames of the bucket
    pixels = torch.from_numpy(batch.crops[:, :3].transpose(0, 1, 4, 2, 3).copy())
    ids = np.where(is_image, model.config.video_token_id, batch.token_ids[0])[None, :n]
    with torch.no_grad():
        features = model.get_video_features(pixels).pooler_output[0].numpy()
        logits = model(input_ids=torch.from_numpy(ids), pixel_values_videos=pixels).logits[0].numpy()
    pool, _ = jax.jit(image_features, static_argnums=0)(ours.config, ours.params, batch.crops)
    found = np.asarray(_pick(pool, batch.feature_index, batch.feature_weight)[0])[is_image]
    np.testing.assert_allclose(found, features, rtol=1e-5, atol=1e-5 * np.abs(features).max())
    output = jax.jit(forward, static_argnums=0)(ours.config, ours.params, batch)
    np.testing.assert_allclose(output.logits[0, :n], logits, atol=1e-4)
    answer = pdrop_jax.generate(pdrop_jax.load(folder), ["What happens?"], [video], max_new_tokens=1)
    assert [len(kept) for (kept,) in answer.kept[0]] == [2, 1]


@pytest.mark.parametrize("family", ["llava_next, mistral with a window", "llava_onevision, qwen2"], indirect=True)
def test_a_small_picture_beside_a_large_one_is_answered_as_alone(family):
    """A picture of three tiles in a bucket of the largest, and text beside both."""
    _, _, folder = family
    ours = pdrop_jax.load(folder)
    small, large = photo(PHOTOS[1]), photo(PHOTOS[2]).resize((300, 300))
    questions = ["What is this?", "And this?", "Hello?"]
    together = pdrop_jax.generate(ours, questions, [small, large, None], max_new_tokens=NEW_TOKENS)
    assert together.image_tokens[0] != together.image_tokens[1]
    for row, (question, image) in enumerate(zip(questions, [small, large, None], strict=True)):
        alone = pdrop_jax.generate(ours, [question], [image], max_new_tokens=NEW_TOKENS)
        assert together.token_ids[row] == alone.token_ids[0]
        assert image is None or together.kept[row] == alone.kept[0]
