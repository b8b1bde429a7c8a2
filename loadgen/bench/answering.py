"""What is said of a stack that does not answer."""

import contextlib
from collections.abc import Iterator

import aiohttp

from loadgen.bench.process import BenchmarkError


@contextlib.contextmanager
def answering(which: str = "the stack") -> Iterator[None]:
    """Raises BenchmarkError in the place of what a client says to whom ``which`` does not answer."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError) as error:
        what = f"{type(error).__name__} {error}".strip()
        raise BenchmarkError(f"{which} did not answer ({what})") from None
