"""``python -m services.scheduler``"""

from common.runtime.process import run_service
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import serve

if __name__ == "__main__":
    run_service(SchedulerSettings, serve)
