"""How a command ends that is asked to: by Ctrl-C, SIGTERM or a terminal that closes, all three alike."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """While the block runs, a signal that asks for the end unwinds it: processes that it started stop, files go.

    In the main thread alone. A second signal cuts that short, so that something may be left.

    Raises:
        SystemExit: there was one; the status is the shell's for it.
    """
    asked: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        asked.append(number)
        # Event loops and everything else know what to do about Ctrl-C.
        signal.raise_signal(signal.SIGINT)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    # ``nohup`` has SIGHUP ignored, and it stays so. A shell's script has SIGINT ignored in what it runs behind itself.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *numbers)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + (asked[0] if asked else signal.SIGINT)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
