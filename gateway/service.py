"""The gateway process: connects, keeps its views current, serves HTTP, and drains."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog
from aiohttp import web

from common.bus.nats_bus import NatsBus
from common.bus.port import Bus
from common.messages.cluster import Service
from common.messages.subjects import PROMPTS_SERVED, ROLE_FLIPPED, VIDEO_BUCKETS, VIDEO_OBJECTS, VIDEO_QUEUES
from common.runtime.membership import MemberChange, MemberLost, MembershipView, Registration
from common.runtime.process import CannotServe
from gateway.app import make_app
from gateway.catalogue import Catalogue
from gateway.chat.desk import LanguageDesk
from gateway.chat.generation import Patience
from gateway.chat.switchboard import Switchboard
from gateway.chat.tokenizer import LanguageTokenizer, TokenizerError, load_tokenizer
from gateway.config import GatewaySettings
from gateway.desk import VideoDesk
from gateway.edge import Edge
from gateway.ledger import VideoLedger
from gateway.metrics import Metrics
from gateway.previews import Previews
from gateway.work import OwnedWork

log = structlog.get_logger()

_VIEWS_DEADLINE_S = 30.0
_BACKLOG = 512


@dataclass(frozen=True)
class Gateway:
    """A gateway that serves. ``url`` is where."""

    url: str
    edge: Edge
    runner: web.AppRunner

    async def drain(self) -> None:
        """Take no new videos, end the event streams, let the other requests come to their end."""
        self.edge.draining.set()
        self.edge.ledger.wake_all()
        await self.runner.cleanup()
        await self.edge.work.settle(self.edge.settings.drain_s)


@contextlib.asynccontextmanager
async def running_gateway(bus: Bus, settings: GatewaySettings, listener: socket.socket) -> AsyncIterator[Gateway]:
    """Serve HTTP on the bound ``listener`` while the block runs.

    The address answers when the block starts; at its end everything is drained and the socket closed.
    """
    await bus.prepare(queues=VIDEO_QUEUES, buckets=VIDEO_BUCKETS, object_buckets=VIDEO_OBJECTS)
    catalogue, metrics = Catalogue(), Metrics()

    board = Switchboard(bus, settings.instance_of(Service.GATEWAY), metrics.language)

    def members_changed(change: MemberChange) -> None:
        catalogue.update(view.members)
        if isinstance(change, MemberLost):
            board.lose(change.member.instance)

    tokenizer = await _tokenizer(settings)
    view = MembershipView(bus, settings.member_timeout_s, members_changed)
    ledger = VideoLedger(bus, settings.listed_videos)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(view.running())
        await stack.enter_async_context(ledger.running(_VIEWS_DEADLINE_S))
        if tokenizer is not None:
            await stack.enter_async_context(board.running())
        work = OwnedWork()
        served = await bus.subscribe(PROMPTS_SERVED, metrics.prompts_served)
        stack.push_async_callback(served.stop)
        flips = await bus.subscribe(ROLE_FLIPPED, metrics.language.role_flipped)
        stack.push_async_callback(flips.stop)
        patience = Patience(settings.route_s, settings.silence_s)
        edge = Edge(
            settings=settings,
            bus=bus,
            members=lambda: view.members,
            catalogue=catalogue,
            ledger=ledger,
            desk=VideoDesk(bus, ledger, settings.bus_deadline_s, settings.retry_after_s),
            previews=Previews(),
            metrics=metrics,
            language=LanguageDesk(bus, board, work, tokenizer, patience, metrics.language) if tokenizer else None,
            work=work,
        )
        stack.callback(edge.previews.close)
        # Without handler_cancellation, a client's leaving would be noticed only by the next write to it.
        runner = web.AppRunner(
            make_app(edge), handler_cancellation=True, access_log=None, shutdown_timeout=settings.drain_s
        )
        await runner.setup()
        gateway = Gateway(await _listen(runner, listener), edge, runner)
        stack.push_async_callback(gateway.drain)
        yield gateway


async def _tokenizer(settings: GatewaySettings) -> LanguageTokenizer | None:
    """The language model's tokenizer, if a model is set.

    Raises:
        CannotServe: it cannot be read.
    """
    if not settings.language_model:
        return None
    try:
        return await asyncio.to_thread(load_tokenizer, settings.language_model)
    except TokenizerError as error:
        raise CannotServe(f"TRIPTYCH_LANGUAGE_MODEL: {error}") from error


class CannotListen(CannotServe):
    """The address is taken, or not this machine's; the message says what to change."""


def bind(settings: GatewaySettings) -> socket.socket:
    """The socket on which to serve, bound but not yet listening.

    Raises:
        CannotListen: see there.
    """
    bound: socket.socket | None = None
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] is not socket.AF_INET)
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise CannotListen(
            f"cannot serve on {settings.host} port {settings.port}: {error.strerror}. Set TRIPTYCH_HOST to an address "
            "of this machine and TRIPTYCH_PORT to a free port (0 takes any)."
        ) from error
    return bound


async def _listen(runner: web.AppRunner, listener: socket.socket) -> str:
    """Answer on the socket; the URL under which it is reached."""
    try:
        await web.SockSite(runner, listener, backlog=_BACKLOG).start()
    except BaseException:
        await runner.cleanup()
        raise
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Run the gateway until ``stop``."""
    with bind(settings) as listener:
        bus = await NatsBus.connect(settings.nats_url, name=settings.instance_of(Service.GATEWAY))
        try:
            async with (
                running_gateway(bus, settings, listener) as gateway,
                Registration(bus, settings, Service.GATEWAY) as registration,
            ):
                await registration.ready()
                log.info("gateway serves", url=gateway.url)
                await stop.wait()
                await registration.draining()
                await gateway.drain()
        finally:
            await bus.close()
