"""Make examples/tiny_tokenizer: a LLaMA-style tokenizer with 320 ids, for the tiny random reference checkpoints.

Ids: 0 <unk>, 1 <s>, 2 </s>, 3..258 the bytes, then letters and merges learned from the text below.
"""

import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 320
LETTERS = list("▁.,:?ATWabcdefghijklmnopqrstuvwxyz")
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXT = """
What is shown in the picture? A small white house stands at the end of a long road. There is a tree on the left and a
red car in front of the door. How many people are there? There are two people, a man and a woman, and they are walking
along the river with their dog. What is the man holding in his hand? He is holding a blue umbrella, because it looks
as if it is going to rain. Describe the weather in this photo. The sky is dark and full of clouds, the street is wet,
and there are some puddles on the ground. What colour is the flower? The flower is yellow with a brown centre, and
behind it you can see green leaves that are out of focus. Is the person in the image happy? Yes, she is smiling at the
camera and waving with one hand. Where was the photo taken? It was probably taken in the mountains, since there is snow
on the peaks in the background. What can you say about the roof of the temple? The roof has several levels with curved
corners, and it is painted in red, green and gold. Which animals do you see here? I see three sheep, one black horse
and a bird that is sitting on the fence. What might happen next? The child who is standing on the bridge might throw
the ball into the water, and then the dog would jump in after it.
"""


def main() -> None:
    merges, pieces = learn(VOCAB_SIZE - len(SPECIAL) - 256)
    names = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(to_text)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    folder = pathlib.Path(__file__).parent / "tiny_tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kind, **tokens}, indent=2) + "\n")


def learn(size: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Merges, and ``size`` pieces in the order of their ids; what is not in LETTERS stays bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"initial_alphabet": LETTERS, "limit_alphabet": len(LETTERS), "show_progress": False}
    tokenizer.train_from_iterator([" ".join(TEXT.split())], trainers.BpeTrainer(vocab_size=size, **options))
    model = json.loads(tokenizer.to_str())["model"]
    return [tuple(merge) for merge in model["merges"]], sorted(model["vocab"], key=model["vocab"].get)


if __name__ == "__main__":
    main()
