"""``python -m services.dit``"""

from common.runtime.process import run_service
from services.dit.config import DitSettings
from services.dit.service import serve

if __name__ == "__main__":
    run_service(DitSettings, serve)
