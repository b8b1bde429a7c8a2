"""The prefill process: computes prompts chunk by chunk, says the first token, and hands the sequence over."""

import asyncio

from common.language.serve import serve_language
from common.language.settings import LanguageSettings
from common.messages.cluster import LanguageRole, Service


async def serve(settings: LanguageSettings, stop: asyncio.Event) -> None:
    await serve_language(settings, stop, Service.PREFILL, (LanguageRole.PREFILL,))
