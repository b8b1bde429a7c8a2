"""``loadgen bench bus``: its bare side gets through to the broker, or says that it does not."""

import pytest

from loadgen.__main__ import main
from loadgen.bench.bus import bare_client
from tests.support.bus import relay
from tests.support.nats_server import NatsServer


async def test_the_bare_side_is_connected_even_where_a_ping_comes_before_the_first_answer(
    nats_server: NatsServer,
) -> None:
    before_answers = iter([b"PING\r\n", b""])
    async with relay(nats_server, before_answers) as url:
        client = await bare_client(url)
        await client.flush(timeout=60)
        assert not list(before_answers), "it connected twice"
        await client.close()


def test_both_sides_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "bus", "--pairs", "2", "--operations", "1"]) == 0
    assert capsys.readouterr().out.count("nats-py") == 2
