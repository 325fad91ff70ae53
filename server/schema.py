"""The requests that are understood, as OpenAI's API has them. What is not supported is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from transformers_patches.load.other_settings import Setting

MOST_MESSAGES, MOST_TOKENS, MOST_STOPS, STOP_LENGTH = 2048, 1 << 20, 16, 512
MOST_TOP_LOGPROBS = 20
LARGEST_SEED = 2**63 - 1
LOST = {  # what would change the answer and is not done, with the values that mean "not used", and what to do
    "n": ((1,), "one answer per request: send n requests"),
    "best_of": ((1,), "one answer per request"),
    "presence_penalty": ((0,), "no penalties: leave it out"),
    "frequency_penalty": ((0,), "no penalties: leave it out"),
    "logit_bias": (({},), "leave it out"),
    "response_format": (({"type": "text"},), "text only: describe the JSON in the prompt"),
    "tools": (([],), "no tools"),
    "functions": (([],), "no tools"),
    "tool_choice": (("none", "auto"), "no tools"),
    "function_call": (("none", "auto"), "no tools"),
    "modalities": ((["text"],), "text only"),
    "audio": ((), "text only"),
    "echo": (
        (False,),
        "a prompt is read by every neuron, so its log-probabilities say nothing about the settings: leave it out",
    ),
    "suffix": (("",), "leave it out"),
    "store": ((False,), "nothing is stored"),
}
# what says nothing about the answer
IGNORED = (
    "user",
    "metadata",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "verbosity",
)


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    partinfer: bool | None = Field(None, description="with every token, what was read for it")


class PartInferOptions(Strict):
    """This project's own settings, where they need no reload."""

    max_loss: float | None = Field(None, ge=0, le=100, description="what the setting may cost, in nats per token")
    method: Literal["partinfer", "dense"] | None = Field(None, description="dense: compute every neuron")

    @model_validator(mode="after")
    def _one_of_both(self) -> PartInferOptions:
        if self.method == "dense" and self.max_loss is not None:
            raise ValueError("max_loss belongs to method partinfer: leave one of them out")
        return self

    @property
    def setting(self) -> Setting:
        return Setting(self.max_loss, dense=self.method == "dense")


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _unicode(text: str) -> str:
    """Refuse halves of characters, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("expected text, got half a character (a lone surrogate)")
    return text


Text = Annotated[str, AfterValidator(_unicode)]


def _text_of(content: object) -> object:
    """Parts of text as one text."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [TextPart.model_validate(part).text for part in content]
        return "".join(texts)
    if isinstance(content, list):
        raise ValueError("only parts of type text are supported")
    return content


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_text_of, json_schema_input_type=str | list[TextPart])]
    name: str | None = None
    refusal: None = None

    def as_dict(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


def _as_list(given: object) -> object:
    return [given] if isinstance(given, str) else given


StopText = Annotated[Text, Field(min_length=1, max_length=STOP_LENGTH)]
Stop = Annotated[
    Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None,
    BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None),
]


class Sampling(Strict):
    """What both endpoints understand."""

    model: str = Field("", max_length=512)
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MOST_TOKENS)
    stop: Stop = None
    seed: int | None = Field(None, ge=-LARGEST_SEED, le=LARGEST_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    partinfer: PartInferOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_lost(cls, given: Any) -> Any:
        """Refuse what is not done, and drop what is given as not used."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in LOST:
                unused, advice = LOST[name]
                if value is not None and not any(type(value) is type(u) and value == u for u in _with_floats(unused)):
                    raise PydanticCustomError(
                        "unsupported", "{name} is not supported ({advice})", {"name": name, "advice": advice}
                    )
            elif name not in IGNORED:
                kept[name] = value
        return kept

    @model_validator(mode="after")
    def _streams_if_asked(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to stream: true")
        return self

    @property
    def setting(self) -> Setting:
        return Setting() if self.partinfer is None else self.partinfer.setting


def _with_floats(values: tuple) -> tuple:
    return (*values, *(float(value) for value in values if type(value) is int))


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs belongs to logprobs: true")
        return self

    @property
    def prompt_input(self) -> list[dict[str, str]]:
        return [message.as_dict() for message in self.messages]

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """How many alternatives are wanted beside each token's log-probability; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


TokenIds = list[Annotated[int, Field(ge=0, le=2**31)]]


def _only(prompt: object) -> object:
    """The one prompt of a list of prompts."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise ValueError("one prompt per request")
        return prompt[0]
    return prompt


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: Annotated[
        Text | TokenIds, BeforeValidator(_only, json_schema_input_type=str | TokenIds | list[str] | list[TokenIds])
    ]
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    def prompt_input(self) -> str | list[int]:
        return self.prompt

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs
