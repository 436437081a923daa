"""Loads a checkpoint's tokenizer: its files are validated, then read by transformers."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers.models import BPE
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from pdrop_jax.errors import UserError, one_line
from pdrop_jax.io import JSON_BYTES, check_file, read_json

SERIALIZED, SENTENCEPIECE, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
OBJECTS = (SERIALIZED, SETTINGS, "special_tokens_map.json", "added_tokens.json")  # files that hold a JSON object
OPENED = ("*.json", "*.model", "*.txt", "*.jinja")  # files that transformers may open


def load_tokenizer(folder: pathlib.Path) -> Any:
    """The transformers tokenizer in a checkpoint's folder. Nothing is downloaded.

    Raises:
      UserError: the tokenizer is missing or cannot be read.
    """
    found = {path.name for path in folder.glob("tokenizer*")}
    # Without these files transformers may silently return an empty tokenizer, or one without BOS.
    if SERIALIZED not in found and not {SENTENCEPIECE, SETTINGS} <= found:
        raise UserError(
            f"{folder} holds no tokenizer: copy {SERIALIZED}, or {SENTENCEPIECE} with {SETTINGS}, "
            "from the original checkpoint into it"
        )
    for path in (path for pattern in OPENED for path in folder.glob(pattern)):
        check_file(path, JSON_BYTES)
    for path in (folder / name for name in OBJECTS):
        content = read_json(path) if path.exists() else {}
        if path.name == SERIALIZED:
            _check_template(content.get("post_processor"), path)
    with reading(folder):
        model = None if SERIALIZED in found else SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if model is not None:
            _order_merges_by_score(tokenizer, model)
        tokenizer.decode(tokenizer("a")["input_ids"])
    return tokenizer


@contextlib.contextmanager
def reading(folder: pathlib.Path) -> Iterator[None]:
    """Turns any error of transformers and tokenizers about the files in ``folder`` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # On a damaged file the tokenizers library raises a bare Exception, or panics, which is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer in {folder} cannot be read: {one_line(error, 200)}") from None


def _check_template(processor: Any, path: pathlib.Path) -> None:
    """Raises UserError if a template uses an undefined token, at which the tokenizers library panics."""
    if not isinstance(processor, dict):
        return
    nested = processor.get("processors")
    for one in nested if isinstance(nested, list) else []:
        _check_template(one, path)
    defined = processor.get("special_tokens")
    for key in ("single", "pair"):
        parts = processor.get(key)
        for part in parts if isinstance(parts, list) else []:
            token = part.get("SpecialToken") if isinstance(part, dict) else None
            name = token.get("id") if isinstance(token, dict) else None
            if isinstance(name, str) and isinstance(defined, dict) and name not in defined:
                raise UserError(
                    f"{path} is malformed: its post_processor has the token {name!r} but does not define it"
                )


def _order_merges_by_score(tokenizer: Any, model: SentencePieceProcessor) -> None:
    # transformers orders merges by id, so it merges runs of spaces first, which LLaMA's model scores lowest.
    scores = {model.id_to_piece(i): model.get_score(i) for i in range(len(model))}
    vocab = {piece: i for i, piece in enumerate(scores)}
    tokenizer.backend_tokenizer.model = BPE(vocab, generate_merges(vocab, scores), fuse_unk=True, byte_fallback=True)
