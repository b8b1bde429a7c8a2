"""What a language model's prefill, decoding and transfer cost on a machine, as ``triptych profile`` has fitted them.

MemServe (arXiv 2406.17565, section 5.3) takes a prefill for the sum of its operators: matrix products by the tokens
computed, attention by pairs of tokens, the rest constant. A pass here is the same sum, with these constants fitted to
passes of the whole model, on whatever it runs. A prompt takes as many passes as it has chunks.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from common.policies.language.prefill_cost import DecodeCost, LinkCost
from common.policies.profile_file import section_of

_KEY = "language_costs"


class WrongLanguageCosts(ValueError):
    """Costs that cannot be used; the text names the field."""


@dataclass(frozen=True, slots=True)
class ChunkedCost:
    """Of prompts that are computed in chunks, one in each pass.

    Attributes:
        chunk_tokens: of a pass, at most.
        pass_s: what a pass takes, whatever it computes.
        token_s, pair_s: for each computed token, and for each token that one of them looks back at, itself included.
        floor_s: the least that a pass takes: that of reading the weights.
    """

    chunk_tokens: int
    pass_s: float
    token_s: float
    pair_s: float
    floor_s: float

    def exec_s(self, prompt_tokens: int, cached_tokens: int) -> float:
        """Of one prompt of which the first tokens are cached."""
        whole, rest = divmod(prompt_tokens - cached_tokens, self.chunk_tokens)
        last = prompt_tokens - rest
        # Chunks that are full keep the machine busy: no floor holds for them.
        total_s = whole * self.pass_s + self._work_s(last - cached_tokens, cached_tokens)
        return total_s + (self.chunk_s(rest, last) if rest else 0.0)

    def chunk_s(self, tokens: int, cached_tokens: int) -> float:
        """Of one pass."""
        return max(self.floor_s, self.pass_s + self._work_s(tokens, cached_tokens))

    def _work_s(self, tokens: int, cached_tokens: int) -> float:
        return self.token_s * tokens + self.pair_s * pairs(tokens, cached_tokens)


def pairs(tokens: int, cached_tokens: int) -> float:
    """How many tokens those computed look back at, all together, themselves included."""
    return tokens * (cached_tokens + (tokens + 1) / 2)


@dataclass(frozen=True, slots=True)
class FitError:
    """Of predictions beside measured times that the fit did not see, as shares of the latter."""

    mean: float
    worst: float
    points: int


@dataclass(frozen=True, slots=True)
class LanguageCosts:
    """Of the model named. ``errors``: of ``prefill``, ``decode`` and ``link``."""

    model: str
    kv_token_bytes: int
    prefill: ChunkedCost
    decode: DecodeCost
    link: LinkCost
    errors: Mapping[str, FitError]

    def __post_init__(self) -> None:
        if self.kv_token_bytes < 1 or self.prefill.chunk_tokens < 1 or not self.link.bytes_per_s > 0:
            raise WrongLanguageCosts("kv_token_bytes, prefill.chunk_tokens, link.bytes_per_s: need to be above 0")
        for part in (self.prefill, self.decode, self.link):
            for name, value in asdict(part).items():
                if not 0 <= value < float("inf"):
                    raise WrongLanguageCosts(f"{name} {value}: needs to be 0 or more")

    def to_content(self) -> dict[str, Any]:
        """What the file of ``triptych profile`` has of it."""
        return {_KEY: asdict(self)}

    @classmethod
    def from_json(cls, text: str) -> "LanguageCosts | None":
        """Read it from that file; None: there is none in it.

        Raises:
            WrongLanguageCosts: it is not what ``to_content`` makes.
        """
        entry = section_of(text, _KEY, WrongLanguageCosts)
        if entry is None:
            return None
        try:
            return cls(
                str(entry["model"]),
                int(entry["kv_token_bytes"]),
                ChunkedCost(**entry["prefill"]),
                DecodeCost(**entry["decode"]),
                LinkCost(**entry["link"]),
                {name: FitError(**error) for name, error in entry["errors"].items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WrongLanguageCosts(f"{_KEY}: {error!r}") from None
