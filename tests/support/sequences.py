"""Sequences as an instance holds them."""

from common.language.held import Held
from common.messages.chat import GenerateTokens, Sampling, pack_tokens

_SAMPLING = Sampling(seed=1, max_tokens=8)
_PROMPT = pack_tokens([1])


def sequence(
    request_id: str = "a",
    tokens: bytes = _PROMPT,
    *,
    epoch: int = 1,
    generated: int = 0,
    sampling: Sampling = _SAMPLING,
    decode: str = "decode-0",
) -> Held:
    """One that was just asked for."""
    return Held.of(
        GenerateTokens(
            request_id=request_id,
            epoch=epoch,
            tokens=tokens,
            generated=generated,
            sampling=sampling,
            gateway="gateway-0",
            decode=decode,
            created_at_s=0.0,
        )
    )
