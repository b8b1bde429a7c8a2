"""What every route works with, kept in the aiohttp application under ``EDGE``."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from common.bus.port import Bus
from common.messages.cluster import Member
from gateway.catalogue import Catalogue
from gateway.chat.desk import LanguageDesk
from gateway.config import GatewaySettings
from gateway.desk import VideoDesk
from gateway.ledger import VideoLedger
from gateway.metrics import Metrics
from gateway.previews import Previews
from gateway.work import OwnedWork


@dataclass(frozen=True)
class Edge:
    """``members`` gives the living members; ``draining`` is set when the gateway takes no new work. ``language`` is
    None where no language is served."""

    settings: GatewaySettings
    bus: Bus
    members: Callable[[], Mapping[str, Member]]
    catalogue: Catalogue
    ledger: VideoLedger
    desk: VideoDesk
    previews: Previews
    metrics: Metrics
    language: LanguageDesk | None = None
    work: OwnedWork = field(default_factory=OwnedWork)
    draining: asyncio.Event = field(default_factory=asyncio.Event)


EDGE = web.AppKey("edge", Edge)
