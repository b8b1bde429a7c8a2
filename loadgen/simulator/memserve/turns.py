"""What a simulated client asks: one turn of a conversation."""

from dataclasses import dataclass, field

from loadgen.simulator.language.requests import ChatRequest


@dataclass(frozen=True, slots=True)
class Turn(ChatRequest):
    """One request, with tokens to be matched.

    Attributes:
        arrival_s: when it is asked, if the one before it has been answered by then.
        conversation: whose turn it is.
        after: the turn that must have been answered before; empty: none.
        tokens: the prompt, packed: whole blocks at least.
        answer: packed likewise; empty where nobody knows it.
    """

    conversation: str = ""
    after: str = ""
    tokens: bytes = field(default=b"", repr=False)
    answer: bytes = field(default=b"", repr=False)

    @property
    def all_tokens(self) -> bytes:
        """Prompt and answer, but for its last token, whose keys and values are never computed."""
        return self.tokens + self.answer[:-4]
