"""``python -m services.decode``"""

from common.runtime.process import run_service
from services.decode.config import DecodeSettings
from services.decode.service import serve

if __name__ == "__main__":
    run_service(DecodeSettings, serve)
