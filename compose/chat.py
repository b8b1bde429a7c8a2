"""``triptych chat``: asks one thing and writes the answer as it comes."""

import asyncio
import sys
from dataclasses import dataclass

from compose.client import StackClient
from compose.errors import StackError
from compose.up import Interruption, report

_INTERRUPTED = 130


@dataclass(frozen=True)
class Question:
    """What is asked. What is None is the server's choice."""

    message: str
    system: str | None = None
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    def fields(self) -> dict[str, object]:
        """The body of the request."""
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        fields: dict[str, object | None] = {
            "messages": [*messages, {"role": "user", "content": self.message}],
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": True,
        }
        return {name: value for name, value in fields.items() if value is not None}


def run_chat(question: Question, base_url: str) -> int:
    """Write the answer to standard output; returns the exit code."""
    return asyncio.run(_chat(question, base_url))


async def _chat(question: Question, base_url: str) -> int:
    interruption = Interruption()
    try:
        async with StackClient(base_url) as client:
            async for text in client.chat(question.fields()):
                sys.stdout.write(text)
                sys.stdout.flush()
    except asyncio.CancelledError:
        if not interruption.asked:
            raise
        return _INTERRUPTED
    except StackError as error:
        sys.stdout.flush()
        report(f"triptych: {error}")
        return error.status
    except TimeoutError:
        report("triptych: the server has been silent for too long; see its log")
        return 1
    sys.stdout.write("\n")
    return 0
