"""What a client asked for, complete and checked: every default filled in, every field that is not supported refused."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.messages.chat import Sampling, tokens_in
from common.messages.cluster import LanguageModelInfo
from gateway.chat.prompts import whole_characters
from gateway.chat.schemas import MAX_SEQUENCES, MAX_STOPS, Ask, CreateChatCompletion, CreateCompletion
from gateway.errors import ApiError, invalid

# OpenAI's default for completions; a chat's answer may fill the context.
_COMPLETION_TOKENS = 16

_NO_TOOLS = "there are no tools here. Leave it out and describe in 'messages' what the answer should look like."
_TEXT_ONLY = "answers are text alone. Leave it out."
# Field: the values of it that ask for nothing, and what to do about the others.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": ((True, False), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "response_format": (
        ({"type": "text"},),
        "answers are plain text. Leave it out, ask for the form in the prompt, and check what comes.",
    ),
    "logit_bias": (({},), "tokens cannot be weighted. Leave it out."),
    "modalities": ((["text"],), _TEXT_ONLY),
    "audio": ((), _TEXT_ONLY),
    "prediction": ((), "nothing is predicted here. Leave it out."),
    "web_search_options": ((), "nothing is searched here. Leave it out and put what is to be known into 'messages'."),
    "reasoning_effort": ((), "the model's effort cannot be set. Leave it out."),
    "verbosity": ((), "say in 'messages' how long the answer should be, or set 'max_tokens'."),
}
_UNSUPPORTED_COMPLETION: dict[str, tuple[tuple[Any, ...], str]] = {
    "echo": ((False,), "the prompt is not repeated. Leave it out and put the prompt before the answer yourself."),
    "best_of": ((1,), "every answer is told. Ask for 'n' of them with 'logprobs' and choose yourself."),
    "suffix": (("",), "text is only continued. Leave it out, or describe in the prompt what comes after the gap."),
    "logit_bias": _UNSUPPORTED["logit_bias"],
    "response_format": _UNSUPPORTED["response_format"],
}
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")


@dataclass(frozen=True)
class Asked:
    """``n`` answers to each of ``prompts`` (packed tokens), ``sampling`` for the first one.

    The others have seeds derived from its. ``conversation``: what the client calls it; empty: nothing.
    """

    model: str
    prompts: tuple[bytes, ...]
    n: int
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    conversation: str = ""

    @property
    def sequences(self) -> list[tuple[bytes, Sampling]]:
        """Each answer's prompt and sampling, by its index: the answers to the first prompt first."""
        return [
            (prompt, self.sampling.model_copy(update={"seed": derived_seed(self.sampling.seed, number)}))
            for prompt in self.prompts
            for number in range(self.n)
        ]


def derived_seed(seed: int, number: int) -> int:
    """The seed of answer ``number`` to a prompt; the first has the seed itself."""
    if number == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def supported(fields: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """The fields without those that are not supported and ask for nothing.

    Raises:
        ApiError: 400, if one asks for something.
    """
    table = _UNSUPPORTED if chat else _UNSUPPORTED_COMPLETION
    for name, value in fields.items():
        # ``1 == True``, so types are compared as well.
        if name in table and value is not None:
            harmless, remedy = table[name]
            if not any(value == other and type(value) is type(other) for other in harmless):
                raise invalid(name, f"{name!r} is not supported: {remedy}", "unsupported_field")
    return {name: value for name, value in fields.items() if name not in table}


def resolve(ask: Ask, prompts: Sequence[bytes], info: LanguageModelInfo, random_seed: int) -> Asked:
    """Fill in the defaults and check what no schema can.

    Raises:
        ApiError: 400, naming the field and the remedy.
    """
    n = ask.n or 1
    if n * len(prompts) > MAX_SEQUENCES:
        raise invalid(
            "n", f"{len(prompts)} prompts with {n} answers each are more than {MAX_SEQUENCES}; send several requests."
        )
    return Asked(
        model=info.name,
        prompts=tuple(prompts),
        n=n,
        sampling=Sampling(
            temperature=_or(ask.temperature, 1.0),
            top_p=_or(ask.top_p, 1.0),
            top_k=max(0, ask.top_k or 0),
            min_p=_or(ask.min_p, 0.0),
            presence_penalty=_or(ask.presence_penalty, 0.0),
            frequency_penalty=_or(ask.frequency_penalty, 0.0),
            repetition_penalty=_or(ask.repetition_penalty, 1.0),
            seed=random_seed if ask.seed is None else ask.seed,
            logprobs=_logprobs(ask),
            stop_token_ids=_stop_token_ids(ask.stop_token_ids),
            ignore_end=bool(ask.ignore_eos),
            max_tokens=_max_tokens(ask, max(map(tokens_in, prompts)), info),
        ),
        stops=_stops(ask.stop),
        stream=bool(ask.stream),
        include_usage=_include_usage(ask),
        conversation=ask.prompt_cache_key or "",
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logprobs(ask: Ask) -> int | None:
    if isinstance(ask, CreateCompletion):
        return ask.logprobs
    if not isinstance(ask, CreateChatCompletion):
        return None
    if ask.top_logprobs is not None and not ask.logprobs:
        raise invalid("top_logprobs", "'top_logprobs' needs 'logprobs': true beside it.")
    return (ask.top_logprobs or 0) if ask.logprobs else None


def _max_tokens(ask: Ask, prompt_tokens: int, info: LanguageModelInfo) -> int:
    room = info.context_tokens - prompt_tokens
    field, wanted = "max_tokens", ask.max_tokens
    if isinstance(ask, CreateChatCompletion) and ask.max_completion_tokens is not None:
        field, wanted = "max_completion_tokens", ask.max_completion_tokens
        if ask.max_tokens not in (None, wanted):
            raise invalid(field, f"{field!r} and 'max_tokens' contradict each other; leave one out.")
    if room < (wanted or 1):
        raise _too_long(field if room > 0 else _prompt_field(ask), prompt_tokens, wanted, info)
    if wanted is None and isinstance(ask, CreateCompletion):
        return min(_COMPLETION_TOKENS, room)
    return wanted or room


def _prompt_field(ask: Ask) -> str:
    return "messages" if isinstance(ask, CreateChatCompletion) else "prompt"


def _too_long(field: str, prompt_tokens: int, wanted: int | None, info: LanguageModelInfo) -> ApiError:
    answer = f", and up to {wanted} more were asked for" if wanted else ""
    return invalid(
        field,
        f"{info.name} has a context of {info.context_tokens} tokens for prompt and answer together; the prompt has "
        f"{prompt_tokens}{answer}. Shorten the prompt or lower 'max_tokens'.",
        "context_length_exceeded",
    )


def _stops(stop: str | list[Any] | None) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"'stop' takes at most {MAX_STOPS} texts, not {len(stops)}.")
    for place, text in enumerate(stops):
        if not isinstance(text, str):
            raise invalid("stop", f"'stop[{place}]' must be a text.", "invalid_type")
        if not text:
            raise invalid("stop", "'stop' holds an empty text, which would end every answer; leave it out.")
        whole_characters(f"stop[{place}]", text)
    return tuple(stops)


def _stop_token_ids(ids: list[Any] | None) -> tuple[int, ...]:
    for token in ids or ():
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**32:
            raise invalid("stop_token_ids", "'stop_token_ids' must be a list of token ids.", "invalid_type")
    return tuple(ids or ())


def _include_usage(ask: Ask) -> bool:
    options = ask.stream_options
    if options is None:
        return False
    if not ask.stream:
        raise invalid("stream_options", "'stream_options' needs 'stream': true; leave one out or send both.")
    for name, value in options.items():
        if name not in _STREAM_OPTIONS:
            known = ", ".join(_STREAM_OPTIONS)
            raise invalid("stream_options", f"Unknown stream option {name[:40]!r}. Known are {known}.", "unknown_field")
        if not isinstance(value, bool):
            raise invalid("stream_options", f"'stream_options.{name}' must be true or false.", "invalid_type")
    return bool(options.get("include_usage"))
