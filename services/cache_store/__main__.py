"""``python -m services.cache_store``"""

from common.runtime.process import run_service
from services.cache_store.config import CacheStoreSettings
from services.cache_store.service import serve

if __name__ == "__main__":
    run_service(CacheStoreSettings, serve)
