"""``python -m gateway``"""

from common.runtime.process import run_service
from gateway.config import GatewaySettings
from gateway.service import serve

if __name__ == "__main__":
    run_service(GatewaySettings, serve)
