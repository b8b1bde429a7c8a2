"""Ports for the stack to listen on: one that was asked for, or any."""

import contextlib
import socket
from collections.abc import Iterator

from common.runtime import ports
from compose.errors import OptionError


def checked_port(host: str, port: int, option: str = "--port") -> int:
    """``port``, if it can be listened on. ``option``: how it was given.

    Raises:
        OptionError: it cannot.
    """
    if not 0 < port < 65536:
        raise OptionError(f"{option} {port}: ports go from 1 to 65535")
    try:
        ports.try_port(host, port)
    except socket.gaierror as error:
        raise OptionError(f"--host {host}: {error.strerror}") from error
    except OSError as error:
        raise OptionError(
            f"port {port} on {host} cannot be used ({error.strerror}); "
            f"stop what uses it or choose another with {option}"
        ) from error
    return port


def free_port(host: str) -> int:
    """A port that nobody listens on right now: see ``common.runtime.ports``.

    Raises:
        OptionError: there is none on ``host``.
    """
    with kept_port(host) as port:
        return port


@contextlib.contextmanager
def kept_port(host: str) -> Iterator[int]:
    """The same, given to nobody else while the block runs.

    Raises:
        OptionError: there is none on ``host``.
    """
    with contextlib.ExitStack() as kept:
        try:
            port = kept.enter_context(ports.kept_port(host))
        except OSError as error:
            raise OptionError(f"--host {host}: {error.strerror}") from error
        yield port
