"""``python -m services.encoder``"""

from common.runtime.process import run_service
from services.encoder.config import EncoderSettings
from services.encoder.service import serve

if __name__ == "__main__":
    run_service(EncoderSettings, serve)
