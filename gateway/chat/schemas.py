"""OpenAI's chat completions and completions, asked and answered, with the extras that vLLM takes.

What a request says is checked further in ``gateway.chat.asked``, where an error can name the place.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from gateway.schemas import Schema

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
MAX_STOPS = 4
MAX_LOGPROBS = 20
MAX_SEQUENCES = 64
_IGNORED = "Taken and ignored."

# --- asked -------------------------------------------------------------------------------------------------------


class Ask(Schema):
    """What both kinds of request may say."""

    model_config = _STRICT

    model: str | None = Field(default=None, description="A model of /v1/models; without it, the only one there is.")
    max_tokens: int | None = Field(default=None, ge=1, description="The most tokens of each answer.")
    n: int | None = Field(default=None, ge=1, le=MAX_SEQUENCES, description="How many answers to each prompt.")
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False, description="0: the likeliest.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Choose from the likeliest that make up this.")
    top_k: int | None = Field(default=None, ge=-1, description="Choose from so many; 0 and -1: from all.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Least share of the likeliest's probability.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10, description="1: none.")
    seed: int | None = Field(
        default=None, ge=-(2**63), le=2**63 - 1, description="Same request, same seed: same answer."
    )
    stop: str | list[Any] | None = Field(
        default=None,
        description=f"A text, or up to {MAX_STOPS}, that end the answer and are not part of it.",
        json_schema_extra={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    )
    stop_token_ids: list[Any] | None = Field(
        default=None,
        description="Tokens that end the answer, beside the model's own.",
        json_schema_extra={"items": {"type": "integer"}},
    )
    ignore_eos: bool | None = Field(default=None, description="Go on to max_tokens, whatever the model says.")
    stream: bool | None = Field(default=None, description="Server-sent events, one for each step, then [DONE].")
    stream_options: dict[str, Any] | None = Field(
        default=None, description="include_usage: an event with the usage before the end."
    )
    user: str | None = Field(default=None, description=_IGNORED)
    metadata: dict[str, Any] | None = Field(default=None, description=_IGNORED)
    store: bool | None = Field(default=None, description=_IGNORED)
    service_tier: str | None = Field(default=None, description=_IGNORED)
    safety_identifier: str | None = Field(default=None, description=_IGNORED)
    prompt_cache_key: str | None = Field(
        default=None, max_length=256, description="Requests with the same one belong together: a hint to where they go."
    )


class CreateChatCompletion(Ask):
    """A conversation to be continued by one message."""

    messages: list[Any] = Field(
        description="The conversation: each message has a role (system, developer, user, assistant) and a content.",
        json_schema_extra={
            "items": {
                "type": "object",
                "properties": {
                    "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
                    "content": {
                        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}],
                        "description": "Text, or a list of parts of type 'text'.",
                    },
                    "name": {"type": "string"},
                },
                "required": ["role", "content"],
            }
        },
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = Field(default=None, description="Tell each token's log-probability.")
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="And those of the likeliest.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="What the model's chat template takes beside the messages."
    )


class CreateCompletion(Ask):
    """A text to be continued."""

    prompt: str | list[Any] = Field(
        description="A text, several, the ids of one, or of several.",
        json_schema_extra={"anyOf": [{"type": "string"}, {"type": "array", "items": {}}]},
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="Tell the log-probabilities of each token and the likeliest."
    )


# --- answered ----------------------------------------------------------------------------------------------------


class PromptTokensDetails(Schema):
    """``cached_tokens``: how many of the prompt's keys and values were there already."""

    cached_tokens: int


class Usage(Schema):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Schema):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Schema):
    content: list[ChatLogprob]
    refusal: None = None


class AssistantMessage(Schema):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


Finish = Literal["stop", "length"]


class ChatChoice(Schema):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Schema):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Schema):
    """What an event adds to the message; the first says the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Schema):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatCompletionChunk(Schema):
    """One event of a streamed chat completion. ``usage`` stands in the last one, which has no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(Schema):
    """For each token: its text, where that begins in the answer, and its log-probability beside the likeliest."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None


class CompletionChoice(Schema):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(Schema):
    """A completion, or one event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
