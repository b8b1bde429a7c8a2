"""Instances take each other's roles while they work: nothing is lost, whatever runs, waits, is cancelled, or dies.

``TRIPTYCH_TEST_FLIPS`` says how many requests there are in the longest of these.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from common.bus.errors import RemoteFailure
from common.bus.nats_bus import NatsBus
from common.language.settings import TransferMode
from common.messages.cluster import FlipRole, LanguageRole, RoleFlipped, Service
from common.messages.dispatch import DecodeLoads
from common.messages.subjects import DECODE_LOADS, FLIP_ROLE, ROLE_FLIPPED
from common.runtime.membership import Registration
from common.runtime.settings import ServiceSettings
from tests.component.chat_support import DECODE, PREFILL
from tests.component.gateway_support import until
from tests.component.language_support import Clients, LanguageStack, gathered, known_prompts, language_stack, shown
from tests.support.asking import asker
from tests.support.bus import eventually
from tests.support.language import FUSED
from tests.support.language_instance import Watched, language_instance
from tests.support.language_model import BLOCK_BYTES
from tests.support.language_processes import language_processes
from tests.support.nats_server import NatsServer
from tests.support.role_flips import flip, flipping

REQUESTS = int(os.environ.get("TRIPTYCH_TEST_FLIPS", "40"))
AT_ONCE = 12
# A second for as many requests as there may be, and a tenth where there are few.
PERIOD_S = 1.0 if REQUESTS >= 1000 else 0.15
ROLES = {"prefill-0": PREFILL, "prefill-1": PREFILL, "decode-0": DECODE, "decode-1": DECODE}
PATIENCE_S = 120.0
KILLS = max(2, REQUESTS // 50)
CLIENTS = 4


@contextlib.asynccontextmanager
async def four(
    broker: NatsServer, folder: Path, dispatch: str = "scheduler", **settings: object
) -> AsyncIterator[tuple[LanguageStack, dict[str, Watched]]]:
    """A stack with two instances for each role."""
    settings["dispatch"] = dispatch
    async with contextlib.AsyncExitStack() as opened:
        stack = await opened.enter_async_context(language_stack(broker.url, folder, dispatch))
        instances = {
            name: await opened.enter_async_context(language_instance(broker.url, name, folder, roles, **settings))
            for name, roles in ROLES.items()
        }
        await stack.served(*ROLES)
        yield stack, instances


async def roles_are(stack: LanguageStack, **roles: tuple[LanguageRole, ...]) -> None:
    """Return once the gateway sees these roles; names are written with an underscore."""

    async def seen() -> bool:
        members = stack.gateway.edge.members()
        return all(members[name.replace("_", "-")].roles == own for name, own in roles.items())

    await until(seen, deadline_s=PATIENCE_S)


async def test_what_decodes_goes_on_elsewhere_and_all_four_can_do_both(
    nats_server: NatsServer, language_model: Path
) -> None:
    prompts = known_prompts(language_model)
    told: list[RoleFlipped] = []
    async with (
        await NatsBus.connect(nats_server.url, name="flipper") as bus,
        four(nats_server, language_model, chunk_tokens=32) as (stack, instances),
    ):
        await bus.subscribe(ROLE_FLIPPED, told.append)
        leaving = instances["decode-0"]
        # At once, unless all answers are at their end before anything can be handed on.
        while not leaving.instance.moving.outcomes["moved"]:
            await flip(bus, "decode-0", LanguageRole.DECODE)
            answers = [asyncio.create_task(stack.text(prompt)) for prompt in list(prompts) * 4]
            await until(_several_decode(leaving, answers), deadline_s=PATIENCE_S)
            flipped = await flip(bus, "decode-0", LanguageRole.PREFILL, ["decode-1"])
            assert (flipped.instance, flipped.roles) == ("decode-0", PREFILL) and flipped.flip_s > 0
            assert await gathered(*answers) == [shown(answer) for answer in prompts.values()] * 4
        # Now everybody does what it has not done before, by a way on which both roles have somebody at every moment.
        await flip(bus, "prefill-0", LanguageRole.DECODE)
        await flip(bus, "decode-1", LanguageRole.PREFILL, ["prefill-0"])
        await flip(bus, "prefill-1", LanguageRole.DECODE)
        await roles_are(stack, prefill_0=DECODE, prefill_1=DECODE, decode_0=PREFILL, decode_1=PREFILL)
        before = {name: one.model.engine.counts.prefilled for name, one in instances.items()}
        again = await gathered(*(stack.text(prompt[::-1] + prompt, 8) for prompt in list(prompts) * 2))
        assert again == await gathered(*(stack.text(prompt[::-1] + prompt, 8) for prompt in list(prompts) * 2))
        assert await gathered(*map(stack.text, prompts)) == [shown(answer) for answer in prompts.values()]
        prefilled = {name: one.model.engine.counts.prefilled - before[name] for name, one in instances.items()}
        assert not prefilled["prefill-0"] and not prefilled["prefill-1"]
        assert prefilled["decode-0"] and prefilled["decode-1"]
        for one in instances.values():
            await one.settled()

        async def all_told() -> bool:
            # Each tells of its own once it has let go of what it had, so in any order.
            flips = {(one.instance, one.roles) for one in told}
            last = {"decode-0": PREFILL, "prefill-0": DECODE, "decode-1": PREFILL, "prefill-1": DECODE}
            return flips >= last.items()

        await until(all_told)


def _several_decode(instance: Watched, answers: list[asyncio.Task[str]]) -> Callable[[], Awaitable[bool]]:
    async def there() -> bool:
        return instance.books.held_blocks > 8 or all(answer.done() for answer in answers)

    return there


async def test_prompts_that_wait_are_routed_anew_and_what_does_not_fit_elsewhere_stays(
    nats_server: NatsServer, language_model: Path
) -> None:
    """Pools so small that most prompts wait, and that nothing can be handed on."""
    prompts = known_prompts(language_model)
    async with (
        await NatsBus.connect(nats_server.url, name="flipper") as bus,
        four(nats_server, language_model, kv_bytes=16 * BLOCK_BYTES, chunk_tokens=8) as (stack, instances),
    ):
        answers = [asyncio.create_task(stack.text(prompt)) for prompt in list(prompts) * 5]

        async def many_wait() -> bool:
            asked = sum(one.instance.sequences for one in instances.values())
            return asked >= 20 or all(answer.done() for answer in answers)

        await until(many_wait, deadline_s=PATIENCE_S)
        await flip(bus, "prefill-1", LanguageRole.DECODE)
        await flip(bus, "decode-0", LanguageRole.PREFILL, ["decode-1", "prefill-1"])
        assert await gathered(*answers) == [shown(answer) for answer in prompts.values()] * 5
        for one in instances.values():
            await one.settled()


async def _nobody_has_room(bus: NatsBus, *decode: str) -> None:
    """Return once all dispatchers have been told so."""
    told: asyncio.Queue[DecodeLoads] = asyncio.Queue()
    listening = await bus.subscribe(DECODE_LOADS, told.put_nowait)
    in_turn = 0
    # The first may not have come to all yet, but comes before the second.
    while in_turn < 2:
        loads = (await asyncio.wait_for(told.get(), PATIENCE_S)).loads
        full = {load.instance for load in loads if load.free_blocks <= 0} == set(decode)
        in_turn = in_turn + 1 if full else 0
    await listening.stop()


async def test_what_nobody_has_room_for_goes_on_where_it_was_prefilled(
    nats_server: NatsServer, language_model: Path
) -> None:
    prompts = known_prompts(language_model)
    async with (
        await NatsBus.connect(nats_server.url, name="flipper") as bus,
        four(nats_server, language_model, "power_of_two", kv_bytes=40 * BLOCK_BYTES, transfer_s=600.0) as (
            stack,
            instances,
        ),
    ):
        memory = {name: instances[name].model.engine.memory for name in ("decode-0", "decode-1")}
        taken = {name: one.alloc_mem(one.available_blocks) or [] for name, one in memory.items()}
        await _nobody_has_room(bus, *memory)
        answers = [asyncio.create_task(stack.text(prompt)) for prompt in prompts]
        prefill = instances["prefill-0"]

        async def held() -> bool:
            return all(
                one.instance.sequences
                and one.instance.sequences == len(one.instance.dispatching)
                and not one.model.engine.busy
                for one in (instances["prefill-0"], instances["prefill-1"])
            )

        await until(held, deadline_s=PATIENCE_S)
        await flip(bus, "prefill-0", LanguageRole.DECODE)
        assert await gathered(*answers) == [shown(answer) for answer in prompts.values()]
        assert prefill.instance.dispatching.choices["prefill-0"]
        for name, one in memory.items():
            one.free_mem(taken[name])
        await _balanced(stack, instances)


@pytest.mark.parametrize(
    ("mode", "dispatch"), [(TransferMode.BY_REQUEST, "scheduler"), (TransferMode.BY_CHUNK, "power_of_two")]
)
async def test_no_request_is_lost_while_roles_flip(
    nats_server: NatsServer, language_model: Path, mode: TransferMode, dispatch: str
) -> None:
    async with four(nats_server, language_model, dispatch, transfer_mode=mode, chunk_tokens=32) as (stack, instances):
        async with flipping(nats_server.url, {name: roles[0] for name, roles in ROLES.items()}, PERIOD_S) as flipper:
            stayed = await _visited(stack, language_model, REQUESTS, leaving=0.0)
            # On a busy machine the requests may have been the quicker ones.
            await eventually(lambda: flipper.flips)
        assert stayed == REQUESTS
        await _balanced(stack, instances)


async def test_the_books_balance_whoever_leaves_while_roles_flip(nats_server: NatsServer, language_model: Path) -> None:
    kv_bytes = 40 * BLOCK_BYTES
    async with four(nats_server, language_model, kv_bytes=kv_bytes, chunk_tokens=32) as (stack, instances):
        async with flipping(nats_server.url, {name: roles[0] for name, roles in ROLES.items()}, PERIOD_S / 3):
            stayed = await _visited(stack, language_model, max(30, REQUESTS // 2), leaving=0.5)
        assert stayed
        await _balanced(stack, instances)


async def _visited(stack: LanguageStack, folder: Path, requests: int, leaving: float) -> int:
    """So many clients, of whom a share leaves at any moment; how many stayed, each with the greedy answer."""
    chance = random.Random(requests)
    prompts = known_prompts(folder)
    room = asyncio.Semaphore(AT_ONCE)

    async def client() -> bool:
        async with room:
            prompt = chance.choice(list(prompts))
            asking = asyncio.create_task(stack.text(prompt))
            if chance.random() < leaving:
                await asyncio.wait((asking,), timeout=chance.uniform(0.0, 0.4))
                asking.cancel()
            try:
                text = await asking
            except asyncio.CancelledError:
                return False
            assert text == shown(prompts[prompt])
            return True

    async with asyncio.timeout(PATIENCE_S + requests):
        return sum(await asyncio.gather(*(client() for _ in range(requests))))


async def _balanced(stack: LanguageStack, instances: dict[str, Watched]) -> None:
    async def idle() -> bool:
        assert stack.gateway.edge.language is not None
        books = [watched.books for watched in instances.values()]
        return (
            stack.gateway.edge.language.active == 0
            and all(one.free_blocks + one.idle_blocks == one.blocks for one in books)
            and not any(watched.model.engine.busy or watched.instance.sequences for watched in instances.values())
        )

    await until(idle, deadline_s=PATIENCE_S)
    assert all(not watched.books.set_aside_blocks for watched in instances.values())


async def test_a_flip_that_cannot_be_announced_changes_nothing(nats_server: NatsServer, language_model: Path) -> None:
    taken = ServiceSettings(nats_url=nats_server.url, instance="decode-0")
    async with (
        await NatsBus.connect(nats_server.url, name="flipper") as bus,
        language_stack(nats_server.url, language_model) as stack,
        language_instance(nats_server.url, "decode-0", language_model) as served,
    ):
        await stack.served("decode-0")
        with pytest.raises(RemoteFailure, match="changes its roles already, or to none"):
            await bus.request(FLIP_ROLE, FlipRole(roles=()), "decode-0")
        async with Registration(bus, taken, Service.DECODE):
            with pytest.raises(RemoteFailure, match="not announced"):
                await flip(bus, "decode-0", LanguageRole.DECODE)
        assert served.instance.roles.now == FUSED


async def test_what_is_held_goes_on_where_it_was_prefilled_though_the_flip_was_not_announced(
    nats_server: NatsServer, language_model: Path
) -> None:
    """Such an instance decodes what it is given, and its own no less."""
    prompt, answer = next(iter(known_prompts(language_model).items()))
    taken = ServiceSettings(nats_url=nats_server.url, instance="prefill-0")
    async with (
        asker(nats_server.url) as asking,
        language_instance(nats_server.url, "prefill-0", language_model, PREFILL, transfer_s=600.0) as served,
    ):
        held = asyncio.create_task(asking.ask(prompt, len(answer), "prefill-0", decode=""))
        engine = served.model.engine
        await eventually(lambda: engine.counts.prefilled and not engine.busy)
        async with Registration(asking.bus, taken, Service.PREFILL):
            with pytest.raises(RemoteFailure, match="not announced"):
                await flip(asking.bus, "prefill-0", LanguageRole.DECODE)
        assert (await held).tokens == answer
        await served.settled()


async def test_who_decodes_from_the_beginning_keeps_what_it_is_to_give_to_nobody_else(
    nats_server: NatsServer, language_model: Path
) -> None:
    prompts = known_prompts(language_model)
    async with (
        asker(nats_server.url) as asking,
        language_instance(nats_server.url, "decode-0", language_model, FUSED) as served,
    ):
        told = await asyncio.gather(
            *(asking.ask(prompt, len(answer), "decode-0", decode="") for prompt, answer in prompts.items())
        )
        assert [one.tokens for one in told] == list(prompts.values())
        await served.settled()


async def test_who_dies_while_roles_flip_costs_no_stream(
    nats_server: NatsServer, language_model: Path, tmp_path: Path
) -> None:
    """The one that flips, or the one that is handed what it has. Who comes back has the role it was started with."""
    chance = random.Random(KILLS)
    prompts = known_prompts(language_model)
    async with (
        language_processes(nats_server.url, language_model, tmp_path, 2, 2, "decode") as processes,
        language_stack(nats_server.url, language_model, silence_s=0.5) as stack,
        await NatsBus.connect(nats_server.url, name="flipper") as bus,
    ):
        clients = Clients(stack, prompts, CLIENTS, chance)

        async def busy() -> None:
            await stack.served(*ROLES)
            await clients.some_more()

        async def kill() -> None:
            for number in range(KILLS):
                await busy()
                leaving, other = ("decode-0", "decode-1") if number % 3 else ("prefill-0", "decode-0")
                role = LanguageRole.PREFILL if number % 3 else LanguageRole.DECODE
                flipping = asyncio.create_task(flip(bus, leaving, role, [other]))
                await asyncio.sleep(chance.uniform(0.0, 0.02))
                dying = chance.choice((leaving, other))
                await processes.kill(dying)
                await asyncio.gather(flipping, return_exceptions=True)
                if dying != leaving:
                    await busy()
                    await flip(bus, leaving, ROLES[leaving][0], [other])
            await busy()

        await stack.served(*ROLES)
        await clients.beside(kill())
