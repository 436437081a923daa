"""Requests in OpenAI's form: what a client may ask, checked, and as the library's own types."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from pdrop_jax.errors import UserError
from pdrop_jax.generation.logprobs import TOP_LOGPROBS
from pdrop_jax.generation.sampling import NUM_SEEDS, Sampling
from pdrop_jax.schema import error_line

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters

# Fields of OpenAI's that would change the answer but are not supported, and the values that mean "nothing".
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "modalities": (None, [], ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}


T = TypeVar("T", bound=BaseModel)


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)  # clients send fields of other servers, which are ignored


def _or_text(make: Callable[[str], Any]) -> BeforeValidator:
    """Lets a string stand for ``make(string)``."""
    return BeforeValidator(lambda value: make(value) if isinstance(value, str) else value)


class Text(_Model):
    type: Literal["text"]
    text: str


class ImageAddress(_Model):
    url: str


class _Shown(_Model):
    mode: Literal["focus", "standby"] = "focus"  # all tokens, or its standby tokens alone, see ``inputs.frames``


class ImageUrl(_Shown):
    type: Literal["image_url"]
    image_url: Annotated[ImageAddress, _or_text(lambda url: {"url": url})]


class Frames(_Shown):
    """A video as the URLs of its frames."""

    type: Literal["video"]
    video: Annotated[list[str], Field(min_length=1)]
    fps: Annotated[float, Field(gt=0, le=1000)] = 2.0


Content = Annotated[Text | ImageUrl | Frames, Field(discriminator="type")]


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Content], Field(min_length=1), _or_text(lambda text: [{"type": "text", "text": text}])]


class StreamOptions(_Model):
    include_usage: bool | None = None


class JsonSchema(_Model):
    json_schema: Annotated[dict[str, Any] | bool, Field(alias="schema")]


class FreeText(_Model):
    type: Literal["text"]


class JsonObject(_Model):
    type: Literal["json_object"]


class JsonOfSchema(_Model):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[FreeText | JsonObject | JsonOfSchema, Field(discriminator="type")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]


class GenerationConfig(_Model):
    """What transformers' chat command sends: a ``transformers.GenerationConfig`` as JSON."""

    do_sample: bool | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


class ChatRequest(_Model):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Annotated[list[Stop] | None, Field(max_length=MAX_STOPS), _or_text(lambda stop: [stop])] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    regex: Annotated[str, Field(max_length=10_000)] | None = None
    generation_config: str | None = None
    pdrop: str | None = None
    pdrop_details: bool | None = None

    @property
    def reported(self) -> int | None:
        """Number of most likely tokens to report at each token; None reports no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def sampling(self, most_tokens: int, seed: int) -> Sampling:
        """OpenAI's defaults, which are temperature 1 and as many tokens as possible.

        Args:
          seed: in place of one that the request does not name.

        Raises:
          UserError: a value is out of range.
        """
        config = GenerationConfig()
        if self.generation_config:
            config = _parsed(GenerationConfig, self.generation_config.encode(), "generation_config")
        if config.do_sample is False:
            config.temperature = 0.0
        length = _first(self.max_completion_tokens, self.max_tokens, config.max_new_tokens, most_tokens)
        if length > most_tokens:
            raise UserError(f"max_tokens is {length:,}, but this server answers in at most {most_tokens:,} tokens")
        return Sampling(
            max_new_tokens=length,
            temperature=_first(self.temperature, config.temperature, 1.0),
            top_k=max(0, _first(self.top_k, config.top_k, 0)),  # other servers take -1 for no limit
            top_p=_first(self.top_p, config.top_p, 1.0),
            seed=_first(self.seed, seed) % NUM_SEEDS,
        )


def read_request(body: bytes) -> ChatRequest:
    """The request in ``body``. Raises UserError, one line about the first thing that is wrong."""
    request = _parsed(ChatRequest, body, "the request")
    for name, neutral in REFUSED.items():
        if (request.model_extra or {}).get(name) not in neutral:
            raise UserError(f"{name} is not supported: leave it out")
    if request.top_logprobs is not None and not request.logprobs:
        raise UserError("top_logprobs needs logprobs: true")
    if request.regex is not None and request.response_format not in (None, FreeText(type="text")):
        raise UserError("response_format and regex are two constraints: pass one of them")
    return request


def _parsed(kind: type[T], content: bytes, where: str) -> T:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            reason = " ".join(error.errors(include_url=False)[0]["msg"].split())
            raise UserError(f"{where} is malformed: {reason}") from None
        raise UserError(error_line(error, kind, data, where)) from None


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)
