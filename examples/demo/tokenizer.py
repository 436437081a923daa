"""The demo's tokenizer: every word of its questions is one token; other text is split into pieces or letters."""

import json
import pathlib
import string

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from examples.demo.grids import SIDE, converse
from examples.demo.photos import GARMENTS

TEMPLATE = "bare"
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1 and 2, as in LLaMA
SPACE = "▁"
LETTERS = [SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
# What may become one token: a word, a punctuation mark, and the end of a question, which alone says what is asked for.
# The answer is predicted from the last token; a model of this size that had to gather the question from earlier tokens
# never learned to look.
WHOLE = "|".join(
    [
        r"▁row▁[0-9],▁column▁[0-9]\?",
        r"(?:▁ankle)?▁[^▁]+(?:▁in▁row▁[0-9]|▁are▁there)\?",
        r"▁(?:row|column)▁[0-9]\?",
        r"▁ankle▁boots?\??",
        r"▁[^▁,.?!]*\??",
        r"[,.?!]",
    ]
)
MOST_TOKENS = 1024  # far more than there are merges to learn
CONVERSATIONS = 4000


def learn_tokenizer() -> Tokenizer:
    """A byte-pair tokenizer learned from the demo's questions and answers."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    # Line breaks and spaces at the edges of a message are not tokens; the only line break is the one after the picture.
    one_space, no_end = normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(left=False, right=True)
    tokenizer.normalizer = normalizers.Sequence([one_space, no_end])
    whole = pre_tokenizers.Split(Regex(WHOLE), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(SPACE, "always", split=False), whole])
    # As in LLaMA: Metaspace's own decoder would remove every space of the first token, including that in "ankle boot".
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS, special_tokens=special, initial_alphabet=LETTERS, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [bos])
    return tokenizer


def _texts() -> list[str]:
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(CONVERSATIONS):
        for turn in converse(rng.integers(len(GARMENTS), size=(SIDE, SIDE)), rng):
            texts += [turn.question, turn.answer]
    return texts


def write_tokenizer(folder: pathlib.Path) -> int:
    """Writes the files that transformers reads. Returns the number of tokens."""
    tokenizer = learn_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer.get_vocab_size()
