"""LLaVA-OneVision in the original format, whose code deletes the last layer of the tower, beside Hugging Face's."""

import json

import jax
import numpy as np
import pytest
import transformers
from PIL import Image
from safetensors.numpy import save_file
from test_source_config import ORIGINAL_7B
from tiny_torch import GOLDEN, byte_tokenizer, tiny_llava, weights
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import pdrop_jax
from pdrop_jax.convert.exporter import export
from pdrop_jax.convert.hf_config import llava_from_hf
from pdrop_jax.convert.importer import convert
from pdrop_jax.errors import UserError
from pdrop_jax.schedule import DropSchedule

PHOTOS = [GOLDEN / f"img_{name}_small.png" for name in ("china", "flower_tall", "astronaut_square")]
# The keys that matter of lmms-lab's llava-onevision-qwen2-7b-ov, whose model_type is that of transformers' class.
HUB_7B = {
    "architectures": ["LlavaQwenForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384 * w, 384 * h] for w in range(1, 7) for h in range(1, 7)],
    "image_token_index": 151646,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "mm_hidden_size": 1152,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "model_type": "llava",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
RENAMED = {
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "image_newline": "model.image_newline",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights as Hugging Face's checkpoint and as the original code's, each beside its conversion."""
    root = tmp_path_factory.mktemp("onevision")
    tokenizer = byte_tokenizer()
    model = tiny_llava(
        kind="llava_onevision",
        model_type="qwen2",
        siglip=True,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        image_token_index=len(tokenizer) - 1,
    )
    settings = {"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # SigLIP's
    images = LlavaOnevisionImageProcessorPil(**settings, image_grid_pinpoints=model.config.image_grid_pinpoints)
    for part in (model, images, tokenizer):
        part.save_pretrained(root / "hf")
    original = root / "original"
    original.mkdir()
    save_file({_renamed(name): x for name, x in weights(root / "hf").items()}, original / "model.safetensors")
    text, vision = (getattr(model.config, name).to_dict() for name in ("text_config", "vision_config"))
    own = {
        key: HUB_7B[key]
        for key in HUB_7B
        if key.startswith("mm_") or key in ("architectures", "rope_theta", "model_type")
    }
    own |= {"mm_hidden_size": 32, "mm_vision_tower": "siglip_tower", "image_aspect_ratio": "anyres_max_2"}
    config = text | own | {"image_grid_pinpoints": "(1x1),...,(3x3)"}
    (original / "config.json").write_text(json.dumps(config))
    tower = original / "siglip_tower"
    tower.mkdir()
    (tower / "config.json").write_text(
        json.dumps(vision | {"num_hidden_layers": vision["num_hidden_layers"] + 1, "vision_use_head": True})
    )
    SiglipImageProcessorPil(**settings).save_pretrained(tower)
    tokenizer.save_pretrained(original)
    schedule = DropSchedule((1, 2), (0.5, 0.25))
    for name in ("hf", "original"):
        convert(root / name, root / f"ours_{name}", schedule=schedule)
    return root


def _renamed(name):
    prefix = next(prefix for prefix in RENAMED if name.startswith(prefix))
    return RENAMED[prefix] + name.removeprefix(prefix)


def test_the_hubs_config():
    config = llava_from_hf(HUB_7B)
    assert (config.text.family, config.template, config.vision.num_layers) == ("qwen2", "qwen", 27)
    assert (config.tiling.max_tiles, config.tiling.alone, len(config.tiling.pinpoints)) == (9, True, 36)
    assert config.tiling.pinpoints[1] == (768, 384)  # height first
    as_text = {"image_grid_pinpoints": "(1x1),...,(6x6)"}, {"image_grid_pinpoints": json.dumps(config.tiling.pinpoints)}
    assert llava_from_hf(HUB_7B | as_text[0]) == config
    assert len(llava_from_hf(HUB_7B | as_text[1]).tiling.pinpoints) == 36


def test_an_original_config_may_have_transformers_model_type():
    known = llava_from_hf(ORIGINAL_7B)
    assert llava_from_hf(ORIGINAL_7B | {"model_type": "llava"}) == known
    assert llava_from_hf(ORIGINAL_7B | {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}) == known


@pytest.mark.parametrize("aspect", ["anyres_max_0", "anyres_max_", "anyres_max_9999"])
def test_other_numbers_of_tiles_are_refused(aspect):
    with pytest.raises(UserError, match=f"image_aspect_ratio '{aspect}' is not supported, expected anyres_max_9"):
        llava_from_hf(HUB_7B | {"image_aspect_ratio": aspect})


def test_the_same_weights_and_answers_as_hugging_faces(folders):
    """The tower as it is saved, without the layer that nothing runs, so that both run all of it."""
    ours, theirs = (pdrop_jax.load(folders / f"ours_{name}") for name in ("original", "hf"))
    assert (ours.config.vision, ours.config.select_layer) == (theirs.config.vision, -1)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    photos = [Image.open(path).convert("RGB") for path in PHOTOS]
    sampling = pdrop_jax.Sampling(6)
    answers = [pdrop_jax.generate(model, ["What?"] * 3, photos, sampling) for model in (ours, theirs)]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].kept == answers[1].kept


def test_the_export_is_the_hugging_face_checkpoint(folders, tmp_path):
    """But for the rows that "<image>" adds, a token that the original code does not have."""
    export(folders / "ours_original", tmp_path / "back", "hf")
    found, expected = weights(tmp_path / "back"), weights(folders / "hf")
    renamed = {name.replace("vision_tower.vision_model.", "vision_tower."): x for name, x in found.items()}
    assert renamed.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(renamed[name][: len(x)], x, err_msg=name)
    data = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (data["model_type"], data["vision_aspect_ratio"]) == ("llava_onevision", "anyres_max_2")
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back", backend="pil")
    assert type(images).__name__.startswith("LlavaOnevisionImageProcessor")
    with pytest.raises(UserError, match="a LLaVA-OneVision model can be exported in Hugging Face's format only"):
        export(folders / "ours_original", tmp_path / "original", "original")
