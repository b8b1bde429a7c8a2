"""Ports of this machine to listen on: the one asked for, if it is free, or one that stays free for a while."""

import errno
import secrets
import socket
from pathlib import Path

from compose.errors import OptionError

_GIVEN_AWAY = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 20_000
_ATTEMPTS = 100


def checked_port(host: str, port: int, option: str = "--port") -> int:
    """``port``, if it can be listened on. ``option``: how it was given.

    Raises:
        OptionError: it cannot.
    """
    if not 0 < port < 65536:
        raise OptionError(f"{option} {port}: ports go from 1 to 65535")
    try:
        _bind(host, port)
    except socket.gaierror as error:
        raise _no_host(host, error) from error
    except OSError as error:
        raise OptionError(
            f"port {port} on {host} cannot be used ({error.strerror}); "
            f"stop what uses it or choose another with {option}"
        ) from error
    return port


def free_port(host: str) -> int:
    """A port that nobody listens on right now.

    It is listened on only later. So it is none of those that the system gives to connections, and to listeners that
    name no port: one of them might get it meanwhile.

    Raises:
        OptionError: this machine has no such address.
    """
    ours = _not_given_away()
    # Not by ``random``, whose seed others may share. Where all are in use, one that is given away has to do.
    drawn = [secrets.choice(ours) for _ in range(_ATTEMPTS)] if ours else []
    for port in (*drawn, 0):
        try:
            return _bind(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not port:
                raise _no_host(host, error) from error
    raise AssertionError("port 0 is bound or refused")


def _not_given_away() -> range:
    try:
        first, _ = _GIVEN_AWAY.read_text(encoding="ascii").split()
    except OSError:
        return range(0)
    return range(_FIRST, int(first))


def _bind(host: str, port: int) -> int:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        bound: int = probe.getsockname()[1]
        return bound


def _no_host(host: str, error: OSError) -> OptionError:
    return OptionError(f"--host {host}: {error.strerror}")
