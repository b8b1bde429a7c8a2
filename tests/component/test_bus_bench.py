"""``loadgen bench bus``: its bare side gets through to the broker, or says that it does not."""

import asyncio

import pytest

from loadgen.__main__ import main
from loadgen.bench.bus import bare_client
from tests.support.nats_server import NatsServer


async def test_the_bare_side_is_connected_even_where_a_ping_comes_before_the_first_answer(
    nats_server: NatsServer,
) -> None:
    before_answers = [b"PING\r\n", b""]

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_connection("127.0.0.1", nats_server.port)
        writer.write(await from_broker.readline() + before_answers.pop(0))
        async with asyncio.TaskGroup() as pipes:
            pipes.create_task(pipe(reader, to_broker))
            pipes.create_task(pipe(from_broker, writer))

    between = await asyncio.start_server(relay, "127.0.0.1", 0)
    host, port = between.sockets[0].getsockname()
    client = await bare_client(f"nats://{host}:{port}")
    await client.flush(timeout=60)
    assert not before_answers, "it connected twice"
    await client.close()
    between.close()
    async with asyncio.timeout(60):
        while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110 - what the relay is at has nobody to tell of its end
            await asyncio.sleep(0.01)


def test_both_sides_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "bus", "--pairs", "2", "--operations", "1"]) == 0
    assert capsys.readouterr().out.count("nats-py") == 2
