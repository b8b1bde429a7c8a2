"""A gateway tells the scheduler what is under way, whatever happens to it once."""

import pytest
from structlog.testing import capture_logs

from common.bus.nats_bus import NatsBus
from common.messages.chat import ChatRoute, ChatsUnderWay
from common.messages.subjects import CHATS_UNDER_WAY
from gateway.chat.switchboard import Switchboard
from gateway.metrics import Metrics
from tests.support.bus import eventually
from tests.support.nats_server import NatsServer


async def test_what_cannot_be_told_once_is_told_later(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.chat.switchboard._TELL_S", 0.02)
    told: list[ChatsUnderWay] = []
    async with await NatsBus.connect(nats_server.url, name="gateway-0") as bus:
        await bus.subscribe(CHATS_UNDER_WAY, told.append)
        board = Switchboard(bus, "gateway-0", Metrics().language)
        # Nothing that a scheduler would say, so that nobody expects what comes of it.
        unheard_of = ChatRoute.model_construct(request_id="a", epoch="none", prefill="p", decode="d", reason="")
        with capture_logs() as said:
            async with board.running():
                with board.line("a", unheard_of, expected=0, max_tokens=1):
                    await eventually(lambda: said)
                told.clear()
                await eventually(lambda: told)
    assert {line["event"] for line in said} == {"not told what is under way"}
    assert told[0] == ChatsUnderWay(gateway="gateway-0", epochs=())
