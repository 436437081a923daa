"""A checkpoint of ours whose config.json is not what it was: a line, or a model that takes a prompt."""

import json

from mutations import mutations, one_line
from PIL import Image
from tiny_run import write_start

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.generation.pretrained import load


def is_config(data):
    try:
        LlavaConfig.from_json(data)
    except UserError:  # tests/convert/test_hostile_configs.py looks at these
        return False
    return True


def test_what_the_schema_accepts_has_to_fit_the_arrays_and_the_tokenizer(tmp_path):
    folder = write_start(tmp_path / "model")
    picture = Image.new("RGB", (40, 30), (9, 8, 7))
    data = json.loads((folder / "config.json").read_text())
    accepted = [each for each in mutations(data) if is_config(each[2])]
    refused = 0
    for path, value, changed in accepted:
        (folder / "config.json").write_text(json.dumps(changed))
        with one_line((path, value), listing=True) as said:
            model = load(folder)
            assert model.processor(["hi"], [picture], max_new_tokens=4).length[0] > 1
        refused += len(said)
    assert 0 < refused < len(accepted)
