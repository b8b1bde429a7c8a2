"""How fast a machine prefills by the size of its chunks, and the size to use.

TetriInfer, section 3.3.3: a chunk is to just saturate the accelerator. Smaller ones leave throughput unused; larger
ones make prompts and decoding sequences beside them wait, and gain nothing. The paper does not say when throughput has
stopped rising; ours is the smallest size within 5 % of the best measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.policies.profile_file import section_of

SATURATED = 0.95


class WrongPrefillProfile(ValueError):
    """A profile that cannot be used; the text names the field."""


@dataclass(frozen=True)
class PrefillProfile:
    """``tokens_per_s`` by the number of tokens in a chunk, of the model named."""

    model: str
    tokens_per_s: Mapping[int, float]

    def __post_init__(self) -> None:
        if not self.tokens_per_s or min(self.tokens_per_s) < 1 or min(self.tokens_per_s.values()) <= 0:
            raise WrongPrefillProfile("prefill.tokens_per_s: needs at least one size of 1 or more, with a rate above 0")

    @property
    def best(self) -> float:
        return max(self.tokens_per_s.values())

    @property
    def chunk_tokens(self) -> int:
        """The size to use."""
        return min(size for size, rate in self.tokens_per_s.items() if rate >= SATURATED * self.best)

    def to_content(self) -> dict[str, Any]:
        """What stands under ``prefill`` in the file that ``triptych profile`` writes."""
        rates = {str(size): rate for size, rate in self.tokens_per_s.items()}
        return {"model": self.model, "chunk_tokens": self.chunk_tokens, "tokens_per_s": rates}

    @classmethod
    def from_json(cls, text: str) -> "PrefillProfile | None":
        """Read it from that file; None: there is none in it.

        Raises:
            WrongPrefillProfile: it is not what ``to_content`` makes.
        """
        entry = section_of(text, "prefill", WrongPrefillProfile)
        if entry is None:
            return None
        try:
            rates = {int(size): float(rate) for size, rate in entry["tokens_per_s"].items()}
            return cls(str(entry["model"]), rates)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WrongPrefillProfile(f"prefill: {error!r}") from None
