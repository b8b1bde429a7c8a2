"""Ports of this machine to listen on: one that was asked for, or any."""

import contextlib
import random
import socket
from pathlib import Path

from compose.errors import OptionError

_GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT, _FIRST_GIVEN_PORT = 10_000, 32_768
_PORT_TRIES = 20
# Not the one that a program may have seeded: two of them would try the same ports.
_CHANCE = random.SystemRandom()


def checked_port(host: str, port: int, option: str = "--port") -> int:
    """``port``, if it can be listened on. ``option``: how it was given.

    Raises:
        OptionError: it cannot.
    """
    if not 0 < port < 65536:
        raise OptionError(f"{option} {port}: ports go from 1 to 65535")
    _bind(host, port, option)
    return port


def free_port(host: str) -> int:
    """A port that nobody listens on right now, of those that no connection is given as its own end.

    One that is could be taken before it is listened on, or while its server is started anew; a client that tries it
    again and again meanwhile may even be given it, and so reach itself.
    """
    given = _bind(host, 0)
    for _ in range(_PORT_TRIES):
        with contextlib.suppress(OptionError):
            return _bind(host, _CHANCE.randrange(_LOWEST_PORT, _first_given_port()))
    return given


def _first_given_port() -> int:
    """Where the range begins from which the kernel gives ports to whoever names none."""
    try:
        return max(_LOWEST_PORT + 1, int(_GIVEN_PORTS.read_text().split()[0]))
    except OSError:
        return _FIRST_GIVEN_PORT


def _bind(host: str, port: int, option: str = "--port") -> int:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            bound: int = probe.getsockname()[1]
            return bound
    except socket.gaierror as error:
        raise OptionError(f"--host {host}: {error.strerror}") from error
    except OSError as error:
        if port:
            raise OptionError(
                f"port {port} on {host} cannot be used ({error.strerror}); "
                f"stop what uses it or choose another with {option}"
            ) from error
        raise OptionError(f"--host {host}: {error.strerror}") from error
