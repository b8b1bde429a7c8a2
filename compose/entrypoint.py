"""The containers' entry point: names the replica, then becomes the service.

Docker Compose tells a container neither its service nor its replica's number, but its network's name server does:
the container's own address resolves back to ``project-service-number.network``. Environment variables of ours that
compose.yaml leaves empty (``TRIPTYCH_INSTANCE``, ``TRIPTYCH_SLOT``) are filled in from there, and
``TRIPTYCH_MEETING_HOST`` with that address.
"""

import os
import re
import socket
import sys
from collections.abc import Callable

_PER_REPLICA = ("TRIPTYCH_INSTANCE", "TRIPTYCH_SLOT")
_ADDRESS = "TRIPTYCH_MEETING_HOST"
# Compose separates by hyphens, and services' names have none; its first generation separated by underscores.
_REPLICA = re.compile(r"(?:(?:.*-)?([a-z0-9_]+)-|(?:.*_)?([a-z0-9]+)_)(\d+)")


class ReplicaError(RuntimeError):
    """The container's name does not say which replica it is."""


def replica_of(container_name: str) -> tuple[str, int]:
    """Service and index (from 0) of ``project-service-number``; a name's network part is ignored.

    Raises:
        ReplicaError: not such a name.
    """
    match = _REPLICA.fullmatch(container_name.partition(".")[0])
    if match is None or int(match[3]) < 1:
        raise ReplicaError(
            f"container {container_name!r} is not named PROJECT-SERVICE-NUMBER: set TRIPTYCH_INSTANCE and TRIPTYCH_SLOT"
        )
    return match[1] or match[2], int(match[3]) - 1


def filled(
    environment: dict[str, str], container_name: Callable[[], str], address: Callable[[], str]
) -> dict[str, str]:
    """``environment`` with what compose.yaml left empty filled in for this replica.

    ``container_name``, and ``address`` at which other containers reach this one, are asked only where one is missing.
    """
    if environment.get(_ADDRESS) == "":
        environment = environment | {_ADDRESS: address()}
    empty = [name for name in _PER_REPLICA if environment.get(name) == ""]
    if not empty:
        return environment
    service, index = replica_of(container_name())
    values = {"TRIPTYCH_INSTANCE": f"{service}-{index}", "TRIPTYCH_SLOT": str(index)}
    return environment | {name: values[name] for name in empty}


def _own_address() -> str:
    return socket.gethostbyname(socket.gethostname())


def _own_name() -> str:
    return socket.gethostbyaddr(_own_address())[0]


def main() -> None:
    """Fill the environment in and replace this process by the command."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m compose.entrypoint COMMAND ...")
    try:
        environment = filled(dict(os.environ), _own_name, _own_address)
    except (OSError, ReplicaError) as error:
        raise SystemExit(f"cannot tell which replica this is: {error}") from error
    os.execvpe(sys.argv[1], sys.argv[1:], environment)


if __name__ == "__main__":
    main()
