"""Health checks that need no tool in the image: ``python -m compose.probe nats HOST:PORT`` or ``http URL``."""

import http.client
import socket
import sys
from urllib.parse import urlsplit

_TIMEOUT_S = 2.0


def nats_answers(host: str, port: int) -> bool:
    """Whether a NATS server with JetStream greets at this address."""
    with socket.create_connection((host, port), timeout=_TIMEOUT_S) as connection:
        greeting = connection.recv(4096)
    return greeting.startswith(b"INFO ") and b'"jetstream":true' in greeting


def http_answers(url: str) -> bool:
    """Whether ``url`` answers 200."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status == http.client.OK
    finally:
        connection.close()


def main(arguments: list[str]) -> int:
    """0 if healthy, 1 if not, 2 on wrong usage."""
    try:
        match arguments:
            case ["nats", address]:
                host, _, port = address.rpartition(":")
                healthy = nats_answers(host, int(port))
            case ["http", url]:
                healthy = http_answers(url)
            case _:
                sys.stderr.write("usage: python -m compose.probe (nats HOST:PORT | http URL)\n")
                return 2
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
