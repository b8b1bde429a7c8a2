"""Tokens to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast


class Detokenizer:
    """One answer's tokens to text. A character whose bytes are not all there yet waits for the tokens to come."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._tokens: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """The text that this token completes, often none."""
        self._tokens.append(token)
        text: str = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._given += len(text)
        return text

    def finish(self) -> str:
        """What is left when no token follows: bytes that are no whole character, as replacement characters."""
        whole: str = self._tokenizer.backend_tokenizer.decode(self._tokens, skip_special_tokens=self._skip)
        return whole[self._given :]


class StopStrings:
    """Holds text back while it may be the beginning of a stop string, and ends the answer before one.

    Args:
        stops: none of them empty.

    Attributes:
        stopped: the stop string that was found, if one was.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped: str | None = None

    def add(self, text: str) -> str:
        """What of the text so far may be given out; nothing any more once a stop string was found."""
        if self.stopped is not None:
            return ""
        self._held += text
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            # The one that is complete first, so that it does not matter in which pieces the text comes.
            place, self.stopped = min(found, key=lambda one: (one[0] + len(one[1]), one[0]))
            free, self._held = self._held[:place], ""
            return free
        waiting = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - waiting
        free, self._held = self._held[:cut], self._held[cut:]
        return free

    def finish(self) -> str:
        """What was held back, when no text follows."""
        free, self._held = self._held, ""
        return free


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that begins the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
