"""LLaVA-NeXT and OneVision from a real photo to the answer, each beside its own processor and class of transformers.

What a program shows is compared all at once: compiling is what takes the time here.
"""

import functools
import json
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
from pdrop_jax.generation.result import kept_tokens
from pdrop_jax.inputs.assemble import assemble
from pdrop_jax.inputs.chat_template import render
from pdrop_jax.model.loss import compute_loss
from pdrop_jax.model.vlm import forward
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.data.pipeline import open_dataset
from pdrop_jax.train.recipe import DataRecipe

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
    "llava_next_video, vicuna": ("llava_next_video", {"num_key_value_heads": 2}),
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
    if kind != "llava_onevision":
        square = {"height": 28, "width": 28}
        images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=square, **settings)
        selected = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        patch_size = model.config.vision_config.patch_size
        processor = transformers.LlavaNextProcessor(images, tokenizer, patch_size=patch_size, **selected)
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


def theirs_of(processor, template, turns, images):
    return processor(text=render(turns, template), images=images, return_tensors="pt")


def assert_same_ids(theirs, ours, batch, b):
    """Their prompt is our row ``b``, text and places of the pictures."""
    ids, is_image = theirs["input_ids"][0].numpy(), batch.image_id[b] > 0
    n = int(batch.length[b])
    np.testing.assert_array_equal(ids == ours.config.image_token_id, is_image[:n])
    np.testing.assert_array_equal(ids[~is_image[:n]], batch.token_ids[b, :n][~is_image[:n]])


def assert_same_answers(ours, model, inputs, features, batch, question, pictures):
    """Features, logits and greedy tokens of each row of ``batch``, which ``pictures`` gave, are those of ``inputs``."""
    output = jax.jit(functools.partial(forward, keep_hidden=True), static_argnums=0)(ours.config, ours.params, batch)
    answer = pdrop_jax.generate(ours, [question] * len(pictures), pictures, pdrop_jax.Sampling(NEW_TOKENS))
    for b, (row, expected) in enumerate(zip(inputs, features, strict=True)):
        n, is_image = int(batch.length[b]), batch.image_id[b] > 0
        with torch.no_grad():
            logits = model(**row).logits[0].numpy()
            new = model.generate(**row, do_sample=False, max_new_tokens=NEW_TOKENS)[0, n:].numpy()
        found = np.asarray(output.layer_inputs[0][0, b, : len(is_image)])[is_image]  # what enters the first layer
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(output.logits[b, :n], logits, atol=1e-4)
        stops = [i for i in range(len(new)) if new[i] in ours.processor.stop_ids]
        assert answer.token_ids[b] == new[: stops[0] if stops else None].tolist()


def test_from_the_photo_to_the_answer(family):
    """Three photos of three shapes in one batch here, one by one there."""
    model, processor, folder = family
    ours = pdrop_jax.load(folder, DropSchedule.none())
    photos, question = [photo(name) for name in PHOTOS], "What is this?"
    turns = [(f"<image>\n{question}", None)]
    theirs = [theirs_of(processor, ours.config.template, turns, [image]) for image in photos]
    batch = ours.processor([question] * 3, photos, max_new_tokens=NEW_TOKENS)
    features = []
    for b, row in enumerate(theirs):
        assert_same_ids(row, ours, batch, b)
        pixels = row["pixel_values"][0].numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(batch.crops[b, : len(pixels)], pixels, atol=1e-6)
        with torch.no_grad():
            found = model.get_image_features(row["pixel_values"], row["image_sizes"]).pooler_output
        features.append(found[0].numpy())
    assert_same_answers(ours, model, theirs, features, batch, question, photos)


VIDEOS = ["llava_next_video, vicuna", "llava_onevision, qwen2"]


@pytest.mark.parametrize("family", VIDEOS, indirect=True)
def test_from_the_frames_to_the_answer(family):
    """Three frames, averaged in fours before the projector or resized behind it."""
    model, _, folder = family
    ours = pdrop_jax.load(folder, DropSchedule.none())
    video = pdrop_jax.Video([photo(name) for name in PHOTOS])
    batch = ours.processor(["What happens?"], [video])
    n, is_image = int(batch.length[0]), batch.image_id[0] > 0
    # A frame's 16 features become four, or its four one; a OneVision has a newline vector behind the last.
    assert is_image.sum() == (3 * 4 if ours.config.frame_stride else 3 * 1 + 1)
    assert batch.crops.shape[1] == 4  # frames of the bucket
    pixels = torch.from_numpy(batch.crops[:, :3].transpose(0, 1, 4, 2, 3).copy())
    ids = np.where(is_image, model.config.video_token_id, batch.token_ids[0])[None, :n]
    with torch.no_grad():
        features = model.get_video_features(pixels).pooler_output[0].numpy()
    inputs = {"input_ids": torch.from_numpy(ids), "pixel_values_videos": pixels}
    assert_same_answers(ours, model, [inputs], [features], batch, "What happens?", [video])


@pytest.mark.parametrize("family", ["llava_next, mistral with a window", *VIDEOS], indirect=True)
def test_every_image_is_dropped_by_its_own_count_as_in_a_batch_of_its_own(family):
    """A small photo beside a large one with another or with a video, and text beside both, with drops."""
    _, _, folder = family
    ours = pdrop_jax.load(folder)
    small, large = photo(PHOTOS[1]), photo(PHOTOS[2]).resize((300, 300))
    knows_videos = ours.config.video_token_id is not None
    last = pdrop_jax.Video([small, large, small]) if knows_videos else photo(PHOTOS[0])
    run = jax.jit(forward, static_argnums=0)

    def asked(questions, pictures):
        batch = ours.processor(questions, pictures)
        output = run(ours.config, ours.params, batch)
        ends = np.asarray(output.buffer.length) - 1
        logits = np.asarray(output.logits)[np.arange(len(ends)), ends]
        counts = [np.bincount(row)[1:].tolist() for row in batch.image_id]
        return counts, kept_tokens(batch, jax.device_get(output.drops)), logits

    questions = ["What is this?", "And these?", "Hello?"]
    counts, kept, logits = asked(questions, [small, [large, last], None])
    assert [len(row) for row in counts] == [1, 2, 0]
    assert counts[0] != counts[1][:1]
    for row, images in zip(counts, kept, strict=True):
        for boundary, ratio in zip(images, (0.5, 0.25), strict=True):
            assert [len(tokens) for tokens in boundary] == [int(count * ratio) for count in row]
    _, kept_alone, alone = asked(questions[:1], [small])
    assert kept[:1] == kept_alone
    np.testing.assert_allclose(logits[:1], alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("family", ["llava_next, mistral with a window", "llava_onevision, qwen2"], indirect=True)
def test_training_on_a_record_of_two_photos(family, tmp_path):
    """Dense, of two answers: ids, targets, the loss, and the gradient of every part, newline vector and tower too."""
    model, processor, folder = family
    ours = pdrop_jax.load(folder, DropSchedule.none())
    config, params = checkpoint.load(folder, schedule=DropSchedule.none())
    turns = [("Is <image> as <image>?", "No."), ("Why?", "A bus, a cat.")]
    messages = [
        {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    (tmp_path / "data.json").write_text(json.dumps([{"image": list(PHOTOS[:2]), "conversations": messages}]))
    data = DataRecipe(str(tmp_path / "data.json"), str(GOLDEN), template=config.template, max_length=1024)
    dataset = open_dataset(data, config, folder)
    (planned,) = dataset.plan_epoch(1, 0, 0)
    batch = assemble([dataset.row(0)[0]], config, planned.bucket, planned.queries)
    theirs = theirs_of(processor, config.template, turns, [photo(name) for name in PHOTOS[:2]])
    assert_same_ids(theirs, ours, batch, 0)
    target = batch.labels[0, : batch.length[0]] != IGNORE
    learned = ours.processor.decode(theirs["input_ids"][0][target])
    assert learned.split() == ["No.", "A", "bus,", "a", "cat."]
    model.zero_grad()
    loss = model(**theirs, labels=torch.where(torch.from_numpy(target), theirs["input_ids"], -100)).loss
    loss.backward()

    found, gradient = jax.jit(jax.value_and_grad(lambda params: compute_loss(config, params, batch)[0]))(params)
    targets = target.sum()
    assert float(found) / targets == pytest.approx(loss.item(), rel=1e-5)
    arrays = flatten_dict(jax.device_get(gradient), sep=".")
    own = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    compared = set()
    for leaf in leaves(config, NAMINGS["hf-5-modules"]):
        parts = arrays[leaf.path] if leaf.stacked else [arrays[leaf.path]]
        for name, part in zip(leaf.names, parts, strict=True):
            expected = own[name]
            ours_of_it = leaf.transform.to_torch(part) / targets
            np.testing.assert_allclose(ours_of_it, expected, atol=1e-4 * np.abs(expected).max() + 1e-6, err_msg=name)
            compared.add(name)
    assert compared == own.keys()
