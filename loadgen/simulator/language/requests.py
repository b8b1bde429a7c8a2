"""Chats as the simulator knows them: how long prompt and answer are, and when which token came."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request.

    Attributes:
        answer_tokens: how many will be generated; only oracles look at it before the end.
        prompt_blocks: one id for every full block of the prompt; requests whose ids begin alike share that prefix.
        answer_blocks: those that the answer fills beyond them.
    """

    name: str
    arrival_s: float
    prompt_tokens: int
    answer_tokens: int
    prompt_blocks: tuple[int, ...] = ()
    answer_blocks: tuple[int, ...] = ()


@dataclass(slots=True)
class Progress:
    """What came of a request. Times are of virtual time, in seconds; infinity: not yet."""

    request: ChatRequest
    first_token_s: float = field(default=float("inf"))
    end_s: float = field(default=float("inf"))
    prefilled_by: str = ""
    decoded_by: str = ""
    cached_tokens: int = 0
    preempted: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.request.arrival_s

    @property
    def jct_s(self) -> float:
        return self.end_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        """Seconds for every token after the first; 0 where there is none."""
        later = self.request.answer_tokens - 1
        return (self.end_s - self.first_token_s) / later if later else 0.0
