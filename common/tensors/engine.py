"""One UCX worker driven by one event loop: endpoints, sends, receives, and when to look.

Messages are received in two ways. As a rule the engine asks UCX what has arrived (a large message is then only an
announcement), and the handler decides where it goes, or that it goes nowhere. So nothing of a message that nobody waits
for any more can land in memory. ``expect`` posts a buffer in advance, which saves that question on the way of a fetch;
such a buffer is UCX's until its message is here or the connection is cut, so it is for memory of our own alone.

Progress sleeps. After an event, every turn of the loop advances UCX for at most ``_TURN_S``, until ``_LINGER_STEPS``
steps in a row (well under a millisecond) brought nothing; then the worker is armed and its event descriptor wakes the
loop.
That is counted in steps, not in time: a process that had to wait for a core has not looked yet. The heartbeat covers
transports that raise no event, as UCX allows.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

from common.tensors.errors import TensorsClosed
from common.tensors.memory import ByteRange
from common.tensors.settings import LIBRARY_ENVIRONMENT, context_options

_TURN_S = 0.002
_STARVING_S = 0.005
_PIECES_AT_ONCE = 16
_BARREN_STEPS = 64
_LINGER_STEPS = 1200
_HEARTBEAT_S = 1.0
_HEARTBEAT_IN_FLIGHT_S = 0.05

Done = Callable[[Exception | None], None]


class PeerGone(Exception):
    """The endpoint cannot be made or has failed."""


class Arrival:
    """A message that has come in and waits to be received or dropped. One of the two must be done at once."""

    __slots__ = ("_probe", "size_bytes", "tag")

    def __init__(self, probe: Any) -> None:
        self._probe = probe
        self.tag: int = probe.sender_tag.value
        self.size_bytes: int = probe.length

    @property
    def probe(self) -> Any:
        return self._probe


class Peer:
    """An endpoint. ``connection`` counts the endpoints between the two processes: see ``wire.FetchRequest``."""

    __slots__ = ("address", "connection", "endpoint", "failed")

    def __init__(self, address: bytes, connection: int, endpoint: Any) -> None:
        self.address = address
        self.connection = connection
        self.endpoint = endpoint
        self.failed = False


class _Awaited:
    """Requests that end together. Looked at from the last one on: a look at many costs no more than at one."""

    __slots__ = ("arrays", "done", "error", "requests")

    def __init__(self, requests: list[Any], arrays: list[Any], done: Done) -> None:
        """``arrays`` keep the memory until all have ended."""
        self.requests = requests
        self.arrays = arrays
        self.done = done
        self.error: Exception | None = None


class Engine:
    """Owns the UCX context and worker of one ``UcxTensors``. Used from its event loop only."""

    def __init__(
        self,
        on_arrival: Callable[[Arrival], None],
        on_peer_lost: Callable[[Peer], None],
    ) -> None:
        if "ucxx" not in sys.modules:
            for name, value in LIBRARY_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        from ucxx import libucxx  # here, not above: a service may fork after importing this module
        from ucxx._lib.arr import Array

        self._ucx = libucxx
        self._array = Array
        self._on_arrival = on_arrival
        self._on_peer_lost = on_peer_lost
        self._loop = asyncio.get_running_loop()
        features = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP)
        self._context = libucxx.UCXContext(context_options(os.environ), feature_flags=features)
        self._worker = libucxx.UCXWorker(self._context)
        self._worker.init_blocking_progress_mode()
        self._any_tag, self._any_mask = libucxx.UCXXTag(0), libucxx.UCXXTagMask(0)
        self._awaited: list[_Awaited] = []
        self._peers: dict[bytes, Peer] = {}
        self._connections: dict[bytes, int] = {}
        self._turn_handle: asyncio.Handle | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._barren = 0
        self._last_turn_s = perf_counter()
        self.closed = False
        self.address = bytes(self._worker.address)
        self._descriptor: int = self._worker.epoll_file_descriptor
        self._sleeping = False
        self._beat()
        self._schedule()

    # Peers

    def peer(self, address: bytes, connection: int = 0) -> Peer:
        """The endpoint for ``address``, made at first use, and made anew where it failed or the other side began anew.

        Raises:
            PeerGone: nobody is there.
            TensorsClosed: after ``close``.
        """
        if self.closed:
            raise TensorsClosed("the tensors of this process are closed")
        peer = self._peers.get(address)
        if peer is not None:
            if not peer.failed and peer.endpoint.alive and connection <= peer.connection:
                return peer
            self.break_off(peer)
        number = max(connection, self._connections.get(address, -1) + 1)
        try:
            target = self._ucx.UCXAddress.create_from_buffer(address)
            endpoint = self._ucx.UCXEndpoint.create_from_worker_address(self._worker, target, True)
        except self._ucx.UCXError as error:
            raise PeerGone(str(error)) from error
        fresh = Peer(address, number, endpoint)
        endpoint.set_close_callback(self._endpoint_closed, cb_args=(fresh,))
        self._peers[address] = fresh
        self._connections[address] = number
        return fresh

    def knows(self, address: bytes) -> bool:
        """Whether there is an endpoint for ``address`` from before."""
        return address in self._peers

    def break_off(self, peer: Peer) -> None:
        """Close the endpoint at once. What was in flight on it ends with an error in one of the next turns."""
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]
        if not peer.failed:
            peer.failed = True
            peer.endpoint.close_blocking(period=10**8, max_attempts=1)
        peer.endpoint.remove_close_callback()  # it refers to the peer: without this, only the collector could free it
        self._schedule()

    def _endpoint_closed(self, peer: Peer) -> None:
        # UCX is in the middle of its progress here: only take note.
        if not peer.failed and not self._loop.is_closed():
            self._loop.call_soon(self._lose, peer)
        peer.failed = True

    def _lose(self, peer: Peer) -> None:
        self.break_off(peer)
        self._on_peer_lost(peer)

    # Messages

    def send(self, peer: Peer, data: ByteRange | bytes, tag: int, done: Done) -> None:
        """Send in place: ``data`` must not change before ``done``.

        Raises:
            PeerGone: the endpoint has failed.
        """
        array = self._array(data)
        try:
            request = peer.endpoint.tag_send(array, self._ucx.UCXXTag(tag))
        except self._ucx.UCXError as error:
            raise PeerGone(str(error)) from error
        self._follow(request, array, done)

    def send_all(self, peer: Peer, messages: Iterable[tuple[ByteRange | bytes, int]], done: Done) -> None:
        """The same with several, each under its tag. ``done`` when all have ended, with one's error if there is any."""
        awaited = _Awaited([], [], done)
        try:
            for data, tag in messages:
                array = self._array(data)
                awaited.requests.append(peer.endpoint.tag_send(array, self._ucx.UCXXTag(tag)))
                awaited.arrays.append(array)
        except self._ucx.UCXError as error:
            awaited.done = _ignore
            self._await(awaited)
            raise PeerGone(str(error)) from error
        self._await(awaited)

    def receive(self, arrival: Arrival, buffer: ByteRange | bytearray, done: Done) -> None:
        """Receive into ``buffer``, which must be of the message's size and stay alive until ``done``."""
        array = self._array(buffer)
        self._follow(self._worker.tag_recv_with_handle(array, arrival.probe), array, done)

    def expect(self, peer: Peer, buffer: ByteRange, tag: int, done: Done) -> None:
        """Receive the message that ``peer`` will send under ``tag`` into ``buffer``, which stays alive until ``done``.

        Raises:
            PeerGone: the endpoint has failed.
        """
        array = self._array(buffer)
        try:
            request = peer.endpoint.tag_recv(array, self._ucx.UCXXTag(tag))
        except self._ucx.UCXError as error:
            raise PeerGone(str(error)) from error
        self._follow(request, array, done)

    def drop(self, arrival: Arrival) -> None:
        """Refuse a message. Its sender sees it as sent; no byte of a large one is moved.

        An eager message is here already and is thrown away. For an announced one, a buffer that is too small makes UCX
        answer the sender without reading its memory.
        """
        size = 1 if arrival.size_bytes else 0
        self.receive(arrival, bytearray(size), _ignore)

    def _follow(self, request: Any, array: Any, done: Done) -> None:
        if request.completed:
            done(self._error(request))
        else:
            self._await(_Awaited([request], [array], done))

    def _await(self, awaited: _Awaited) -> None:
        if self._have_ended(awaited):
            awaited.done(awaited.error)
        else:
            self._awaited.append(awaited)
            self._schedule()

    def _have_ended(self, awaited: _Awaited) -> bool:
        requests = awaited.requests
        while requests and requests[-1].completed:
            awaited.error = self._error(requests.pop()) or awaited.error
        return not requests

    def _error(self, request: Any) -> Exception | None:
        try:
            request.check_error()
        except self._ucx.UCXError as error:
            return PeerGone(str(error))
        return None

    @property
    def in_flight(self) -> int:
        return sum(len(awaited.requests) for awaited in self._awaited)

    # Progress

    def _sleep(self) -> None:
        if not self._sleeping:
            self._sleeping = True
            self._loop.add_reader(self._descriptor, self._turn)

    def _rouse(self) -> None:
        # The descriptor stays readable until the worker is armed again: while awake, it must not call.
        if self._sleeping:
            self._sleeping = False
            self._loop.remove_reader(self._descriptor)

    def look(self, until: Callable[[], bool]) -> None:
        """Advance at once, without a turn of the event loop: a near answer is here in less time than that takes.

        Ends when ``until`` holds, nothing came in ``_LINGER_STEPS`` steps, or a turn's time is over. What is left is
        done in the turns that follow.
        """
        ends_s = perf_counter() + _TURN_S
        self._barren = 0
        while self._barren < _LINGER_STEPS:
            if self._advance():
                self._barren = 0
                if until() or perf_counter() > ends_s:
                    break
                self.hand_on()
            else:
                self._barren += 1
        self._barren = 0
        self._schedule()

    def starving(self) -> bool:
        """Whether the event loop has not had a turn for long, because ``look`` found all that was wanted each time."""
        return perf_counter() - self._last_turn_s > _STARVING_S

    def _schedule(self) -> None:
        if self._turn_handle is None and not self.closed:
            self._turn_handle = self._loop.call_soon(self._turn)

    def _beat(self) -> None:
        delay_s = _HEARTBEAT_IN_FLIGHT_S if self._awaited else _HEARTBEAT_S
        self._heartbeat = self._loop.call_later(delay_s, self._beat)
        self._schedule()

    def _turn(self) -> None:
        """Advance for a while, then come again soon, or arm and sleep."""
        if self._turn_handle is not None:
            self._turn_handle.cancel()
            self._turn_handle = None
        if self.closed:
            return
        self._rouse()
        self._last_turn_s = perf_counter()
        self.hand_on()  # making an endpoint advances UCX as well, and may have brought something in
        ends_s = self._last_turn_s + _TURN_S
        pause_at = self._barren + _BARREN_STEPS
        while self._barren < pause_at:
            if self._advance():
                self.hand_on()
                self._barren, pause_at = 0, _BARREN_STEPS
                if self.closed or perf_counter() > ends_s:
                    break
            else:
                self._barren += 1
        if self.closed:
            return
        if self._barren < _LINGER_STEPS or not self._worker.arm():
            self._schedule()
        else:
            self._sleep()

    def _advance(self) -> bool:
        """Advance UCX and end what is finished by that; whether anything happened. Arrivals are not handed on yet.

        UCX moves a large tensor half a megabyte a step. To look for arrivals after each would cost a tenth of the time.
        """
        steps = 0
        while steps < _PIECES_AT_ONCE and self._worker.progress_once():
            steps += 1
        if not steps:
            return False
        if self._awaited:
            self._complete()
        return True

    def hand_on(self) -> None:
        """Give what has arrived to its handler."""
        while not self.closed:
            probe = self._worker.tag_probe(self._any_tag, self._any_mask, remove=True)
            if not probe.matched:
                return
            self._on_arrival(Arrival(probe))

    def _complete(self) -> None:
        finished = [awaited for awaited in self._awaited if self._have_ended(awaited)]
        if not finished:
            return
        self._awaited = [awaited for awaited in self._awaited if awaited.requests]
        for awaited in finished:
            awaited.done(awaited.error)

    # End

    async def close(self, deadline_s: float) -> None:
        """Let what is in flight end until ``deadline_s`` (the loop's time), then close every endpoint."""
        while self._awaited and self._loop.time() < deadline_s:
            self._schedule()
            await asyncio.sleep(0.005)
        for peer in list(self._peers.values()):
            self.break_off(peer)
        grace_s = self._loop.time() + 0.2
        while self._awaited and self._loop.time() < grace_s:
            self._schedule()
            await asyncio.sleep(0.001)
        self.closed = True
        self._rouse()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._awaited.clear()
        self._peers.clear()
        del self._worker, self._context


def _ignore(error: Exception | None) -> None:
    """A dropped message ends as truncated: that is what was wanted."""
