"""Answers that follow a JSON schema or a regular expression, by llguidance."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pdrop_jax.errors import UserError, printable
from pdrop_jax.generation.engine import stop_ids_of
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.serve.protocol import ChatRequest, JsonObject, JsonOfSchema

SPACE = "\u2581"  # how SentencePiece writes a space


def grammar_of(request: ChatRequest) -> str | None:
    """The grammar that a request asks for, in llguidance's notation. It may be invalid; see ``Grammars.constraint``."""
    if request.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(request.regex)
    if isinstance(request.response_format, JsonObject):
        return _grammar_of_schema({"type": "object"})
    if isinstance(request.response_format, JsonOfSchema):
        return _grammar_of_schema(request.response_format.json_schema.json_schema)
    return None


def _grammar_of_schema(schema: Any) -> str:
    # With as much white space as JSON allows, a model may write nothing else.
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": " ?"})


class Grammars:
    """Makes the constraints of a model's answers."""

    def __init__(self, model: Model) -> None:
        self.tokens = token_bytes(model)
        stop_ids = stop_ids_of(model).tolist()
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(self.tokens, stop_ids[0]))
        self._tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(self.tokens), eos_token=stop_ids)

    def constraint(self, grammar: str) -> "GrammarConstraint":
        """A new constraint for one answer. Raises UserError if the grammar is invalid, unsupported or too large."""
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"the schema or regex cannot be used: {_one_line(matcher.get_error())}")
        return GrammarConstraint(matcher)


class GrammarConstraint:
    """A ``stopping.Constraint``."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def accept(self, ids: Sequence[int]) -> None:
        self._matcher.consume_tokens(list(ids))

    def allowed(self) -> np.ndarray:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        if self._matcher.is_error():
            raise UserError(f"the schema or regex is too complex: {_one_line(self._matcher.get_error())}")
        return mask


def token_bytes(model: Model) -> list[bytes]:
    """The bytes of each of the V tokens inside an answer; empty for added and unused ones, which are no text."""
    tokenizer, size = model.processor.tokenizer, model.config.text.vocab_size
    decoder = tokenizer.backend_tokenizer.decoder
    to_bytes = _byte_level if decoder and b"ByteLevel" in decoder.__getstate__() else _sentence_piece
    pieces: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    pieces += [None] * (size - len(pieces))
    added = tokenizer.added_tokens_decoder
    return [b"" if piece is None or i in added else to_bytes(piece) for i, piece in enumerate(pieces)]


def _sentence_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE, " ").encode()


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def _byte_level(piece: str) -> bytes:
    known = _bytes_of_letters()
    return bytes(known[letter] for letter in piece) if set(piece) <= known.keys() else piece.encode()


class _Vocabulary:
    """What llguidance asks of a tokenizer. It splits text that must come into the longest tokens.

    llguidance reads the usual tokenizers itself, but not all that transformers does.
    """

    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos_token_id: int) -> None:
        self.tokens, self.eos_token_id = tokens, eos_token_id
        self.special_token_ids = [i for i, token in enumerate(tokens) if not token]
        self._ids = {token: i for i, token in reversed(list(enumerate(tokens))) if token}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes | str) -> list[int]:
        rest, ids = text.encode() if isinstance(text, str) else text, []
        while rest:
            sizes = range(min(self._longest, len(rest)), 0, -1)
            size = next((size for size in sizes if rest[:size] in self._ids), None)
            if size is None:  # in no token: what comes before it is certain
                break
            ids.append(self._ids[rest[:size]])
            rest = rest[size:]
        return ids


def _one_line(text: str) -> str:
    return printable(" ".join(text.partition("\n")[0].split())[:200])
