"""A small real process for the tests of what starts, watches and stops processes.

``python -m tests.support.worker MODE`` writes what happens to it into the file that ``EVENTS`` names, one line each:
``NAME event``, where NAME is ``TRIPTYCH_INSTANCE``. Modes: ``obedient`` ends on SIGTERM, ``deaf`` does not,
``broken`` ends at once with exit code 3 and a last word, ``misled`` with exit code 2,
``serving`` listens on ``PORT`` a moment after its start.
"""

import os
import signal
import socket
import sys
import time


def tell(event: str) -> None:
    """Append one line; small appends are atomic."""
    descriptor = os.open(os.environ["EVENTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, f"{os.environ['TRIPTYCH_INSTANCE']} {event}\n".encode())
    os.close(descriptor)


def main(mode: str) -> None:
    """Live as ``mode`` says."""
    if mode in ("broken", "misled"):
        tell("started")
        sys.stderr.write("the last word of a broken worker\n")
        raise SystemExit(3 if mode == "broken" else 2)
    # From the moment it is told that this has started, it may be asked to stop.
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else signal.default_int_handler)
        _live(mode)
    except KeyboardInterrupt:
        tell("stopped")


def _live(mode: str) -> None:
    sys.stderr.write('level=info event=started\nlevel=warning event="something odd"\n')
    tell(f"started slot={os.environ.get('TRIPTYCH_SLOT')} torch={'torch' in sys.modules} json={'json' in sys.modules}")
    with socket.socket() as listener:
        if mode == "serving":
            time.sleep(0.3)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", int(os.environ["PORT"])))
            # Before anybody can know.
            tell("serving")
            listener.listen()
        while True:
            # Not ``pause``: a signal just before it would be heard by nobody until the next one.
            time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1])
