"""``python -m services.vae``"""

from common.runtime.process import run_service
from common.runtime.settings import WorkerSettings
from services.vae.service import serve

if __name__ == "__main__":
    run_service(WorkerSettings, serve)
