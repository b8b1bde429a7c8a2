"""Mooncake's public traces: one JSON object a line, with one id for every block of 512 tokens of the prompt."""

import json
from collections.abc import Iterable
from pathlib import Path

from common.mempool.address import KEY_BYTES
from loadgen.simulator.language.workloads import WrongTrace
from loadgen.simulator.memserve.turns import Turn

BLOCK_TOKENS = 512


def read_mooncake(file: Path, speed: float = 1.0) -> list[Turn]:
    """All requests of a trace, in order.

    A block's id becomes as many bytes as one block of an index has, so that trees, pools and views work as they do on
    tokens. A prompt's last block counts only if it is whole. The trace says nothing of answers' tokens, nor which
    requests belong together: a request belongs to the conversation whose prompt goes on in its own, beyond the first
    block, which nearly all have in common.

    Args:
        speed: how many times as fast requests come.

    Raises:
        WrongTrace: see there.
    """
    try:
        turns = _turns(file.read_text(encoding="utf-8").splitlines(), speed)
    except OSError as error:
        raise WrongTrace(f"{file}: {error.strerror}") from error
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise WrongTrace(f"{file} is no Mooncake trace: {error!r}") from error
    if not turns:
        raise WrongTrace(f"{file}: there is no request in it")
    return turns


def _turns(lines: Iterable[str], speed: float) -> list[Turn]:
    turns: list[Turn] = []
    conversations: dict[int, str] = {}
    for number, line in enumerate(lines):
        row = json.loads(line)
        prompt_tokens = int(row["input_length"])
        blocks = [int(one) for one in row["hash_ids"]][: prompt_tokens // BLOCK_TOKENS]
        own = blocks[1:]
        known = next((conversations[block] for block in reversed(own) if block in conversations), None)
        conversation = known or f"conversation-{number}"
        conversations.update(dict.fromkeys(own, conversation))
        turns.append(
            Turn(
                name=f"request-{number}",
                arrival_s=float(row["timestamp"]) / 1000 / speed,
                prompt_tokens=prompt_tokens,
                answer_tokens=max(1, int(row["output_length"])),
                conversation=conversation,
                tokens=b"".join(block.to_bytes(KEY_BYTES, "little") for block in blocks),
            )
        )
    return turns
