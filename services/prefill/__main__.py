"""``python -m services.prefill``"""

from common.language.settings import LanguageSettings
from common.runtime.process import run_service
from services.prefill.service import serve

if __name__ == "__main__":
    run_service(LanguageSettings, serve)
