"""Ports of this machine that can be listened on."""

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

_GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT, _FIRST_GIVEN_PORT = 10_000, 32_768
_PORT_TRIES = 20
# Not the one that a program may have seeded: two of them would try the same ports.
_CHANCE = random.SystemRandom()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on right now, of those that no connection is given as its own end.

    One that is could be taken before it is listened on, or while its server is started anew; a client that tries it
    again and again meanwhile may even be given it, and so reach itself.

    Raises:
        OSError: ``host`` is unknown, or not this machine.
    """
    with kept_port(host) as port:
        return port


@contextlib.contextmanager
def kept_port(host: str = "127.0.0.1") -> Iterator[int]:
    """As ``free_port``, for a server that comes late, or goes and comes: while the block runs nobody else is given it.

    The server has to allow that its address is used again (SO_REUSEADDR), as most do.

    Raises:
        OSError: see ``free_port``.
    """
    with _bound_alone(host) as keeper:
        # Not before: from here on a server may be bound beside it, but nobody who looks for a port for himself alone.
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield keeper.getsockname()[1]


def _bound_alone(host: str) -> socket.socket:
    family = _family(host)
    for _ in range(_PORT_TRIES):
        with contextlib.suppress(OSError):
            return _bound(family, host, _CHANCE.randrange(_LOWEST_PORT, _first_given_port()))
    return _bound(family, host, 0)


def _bound(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


def try_port(host: str, port: int) -> None:
    """Bind ``port`` as a server would, and let it go again.

    Raises:
        OSError: it cannot be bound; as socket.gaierror: ``host`` is unknown.
    """
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]


def _first_given_port() -> int:
    """Where the range begins from which the kernel gives ports to whoever names none."""
    try:
        return max(_LOWEST_PORT + 1, int(_GIVEN_PORTS.read_text().split()[0]))
    except OSError:
        return _FIRST_GIVEN_PORT
