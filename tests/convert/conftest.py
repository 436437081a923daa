"""Tiny PyTorch checkpoints to convert."""

import pathlib
import shutil

import pytest
from tiny_torch import GOLDEN, VARIANTS, tiny_llava


@pytest.fixture(scope="session")
def torch_model():
    """variant -> the model and the folder that transformers saved it in."""
    return {variant: tiny_llava(**text) for variant, text in VARIANTS.items()}


@pytest.fixture(scope="session")
def hf_folder(torch_model, tmp_path_factory):
    """variant -> the folder that transformers 5 saved the model in."""
    root = tmp_path_factory.mktemp("hf")
    for variant, model in torch_model.items():
        model.save_pretrained(root / variant)
    return {variant: root / variant for variant in torch_model}


@pytest.fixture
def hf(hf_folder, tmp_path):
    """A copy of the small GQA checkpoint to spoil."""
    return pathlib.Path(shutil.copytree(hf_folder["gqa"], tmp_path / "hf"))


@pytest.fixture
def original(tmp_path):
    """A copy of the recorded original checkpoint to spoil, with its tower's folder beside it."""
    shutil.copytree(GOLDEN / "clip_tower", tmp_path / "clip_tower")
    return pathlib.Path(shutil.copytree(GOLDEN / "model_gqa", tmp_path / "original"))
