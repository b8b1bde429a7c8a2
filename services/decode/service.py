"""The decode process: goes on with sequences token by token, many at once; fused, it prefills them too."""

import asyncio

from common.language.serve import serve_language
from common.messages.cluster import LanguageRole, Service
from services.decode.config import DecodeSettings

_ROLES = {"fused": (LanguageRole.PREFILL, LanguageRole.DECODE), "decode": (LanguageRole.DECODE,)}


async def serve(settings: DecodeSettings, stop: asyncio.Event) -> None:
    await serve_language(settings, stop, Service.DECODE, _ROLES[settings.role])
