"""``python -m gateway``"""

import sys

from common.runtime.process import run_service
from gateway.config import GatewaySettings
from gateway.service import CannotListen, serve


def main() -> None:
    try:
        run_service(GatewaySettings, serve)
    except CannotListen as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
