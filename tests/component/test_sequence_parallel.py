"""STDiT3 on groups of real processes: whatever the group, and however it changes, the latent is one process's own.

Four processes stand for four DiT workers. They are started once, driven over pipes, and do between two steps what a
worker does: enter a group, hand the state to newcomers, take the step, leave.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.models.opensora import OpenSoraVAE, OpenSoraVAEConfig, PreparedText, STDiT3, STDiT3Config
from common.models.opensora.join_state import JoinState, share_state
from common.models.opensora.loading import save_stdit3, save_vae
from common.models.opensora.parallel import Parallelism, ParallelSTDiT3, SequenceParallelism
from common.models.opensora.pipeline import Denoiser, DenoisingRun
from common.models.opensora.sharding import shares
from common.models.opensora.spec import VideoDefaults, VideoModelSpec
from common.models.opensora.ulysses import UlyssesAttention
from common.models.opensora.vae_config import SpatialVAEConfig, TemporalVAEConfig
from common.parallel.errors import GroupBroken
from common.parallel.group import Group
from common.parallel.groups import Groups
from tests.golden.support import randomise

WORKERS = 4
WAIT_S = 120.0
START_S = 240.0
# Within which members must come and say something: longer than a busy machine has any of them stand still, but for the
# test in which one hangs.
PATIENCE_S, IMPATIENCE_S = 60.0, 6.0
ATOL = 1e-4
STEPS = 4
CAPTION_CHANNELS = 24
PROMPT_TOKENS = 12


@dataclass(frozen=True)
class Video:
    """A request. prompt, negative: numbers of tokens; negative 0: the null caption."""

    frames: int = 17
    width: int = 36
    height: int = 20
    guidance_scale: float = 2.0
    prompt: int = 7
    negative: int = 0
    steps: int = STEPS


# T frames of S patches: T=5 S=15, T=4 S=16, T=1 S=15, T=3 S=1, T=2 S=9 (the VAE here: 9 frames to 3, sides by 4;
# patches of 2x2).
VIDEOS = {
    "T5 S15": Video(),
    "T4 S16 negative": Video(frames=13, width=32, height=32, negative=11),
    "T1 S15 unequal prompts": Video(frames=1, prompt=12, negative=3),
    "T3 S1": Video(frames=9, width=8, height=8),
    "T5 S9 unguided": Video(width=24, height=24, guidance_scale=1.0),
}
DSP, ULYSSES = SequenceParallelism.DSP, SequenceParallelism.ULYSSES


@dataclass(frozen=True)
class Turn:
    """One step: by whom, in rank order, and how. root: the rank that has the state when members change."""

    members: tuple[int, ...]
    parallelism: Parallelism = field(default_factory=Parallelism)
    root: int = 0


@dataclass(frozen=True)
class Fate:
    """What befalls one worker: the signal it gets in step `turn`, before its exchange number `exchange`."""

    turn: int
    exchange: int
    signal: int


@dataclass(frozen=True)
class Played:
    """How a worker's part went. latent: where it stands; broken: why and after how long the group was lost."""

    steps_done: int
    latent: np.ndarray | None
    broken: str | None = None
    waited_s: float = 0.0


# --- a worker's side ---------------------------------------------------------------------------------------------


class Fated:
    """A group in which this process is struck before a certain exchange."""

    def __init__(self, group: Group, fate: Fate) -> None:
        self._group = group
        self._fate = fate
        self._exchanges = 0
        self.rank, self.size = group.rank, group.size

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        self._count()
        return self._group.all_to_all(pieces, shapes)

    def all_gather(self, piece: Tensor) -> list[Tensor]:
        self._count()
        return self._group.all_gather(piece)

    def _count(self) -> None:
        if self._exchanges == self._fate.exchange:
            os.kill(os.getpid(), self._fate.signal)
        self._exchanges += 1


class Worker:
    """One DiT worker without its bus."""

    def __init__(self, index: int, name: str, spec: VideoModelSpec) -> None:
        torch.set_num_threads(1)
        self._index = index
        self._name = name
        self.wait(PATIENCE_S)
        self._denoiser = Denoiser(spec, "cpu")
        self._parallel = ParallelSTDiT3(self._denoiser.model)
        self._run: DenoisingRun | None = None
        self._names: Mapping[int, str] = {}
        self._addresses: Mapping[int, str] = {}

    def wait(self, seconds: float) -> None:
        """Wait so long for the others from now on, in new groups."""
        self._groups = Groups(self._name, exchange_timeout_s=seconds, meeting_timeout_s=seconds)

    def address(self) -> str:
        return self._groups.address

    def know(self, names: Mapping[int, str], addresses: Mapping[int, str]) -> None:
        self._names, self._addresses = names, addresses

    def forget(self, name: str) -> None:
        self._groups.forget(name)

    def play(self, video: Video, turns: Sequence[Turn], token: int, fate: Fate | None, resumed: bool) -> Played:
        """Take part in the steps of `turns`, from the seed on or from where the worker stands."""
        if not resumed:
            self._run = None
        members: tuple[int, ...] = ()
        for index, turn in enumerate(turns):
            if self._index not in turn.members:
                self._run = None  # leaving moves nothing
            else:
                started = time.monotonic()
                try:
                    self._take(video, turn, token + index, turn.members != members, fate, index)
                except GroupBroken as broken:
                    return self._standing(str(broken), time.monotonic() - started)
            members = turn.members
        return self._standing()

    def predict(
        self, members: tuple[int, ...], parallelism: Parallelism, arrays: Mapping[str, np.ndarray], token: int
    ) -> np.ndarray:
        """One forward for a batch with frame masks and a frame rate for each row."""
        group = self._enter(Turn(members), token)
        return forward(self._parallel.on(group, parallelism), self._denoiser.model, arrays)

    def _take(self, video: Video, turn: Turn, token: int, changed: bool, fate: Fate | None, index: int) -> None:
        group = self._enter(turn, token)
        if changed:
            self._run = self._joined(video, group, turn.root)
        assert self._run is not None
        assert group.agree(self._run.steps_done, turn.root) == self._run.steps_done
        peers = Fated(group, fate) if fate is not None and fate.turn == index else group
        self._run.step(self._parallel.on(peers, turn.parallelism))

    def _enter(self, turn: Turn, token: int) -> Group:
        leader = turn.members[turn.root]
        return self._groups.enter([self._names[each] for each in turn.members], self._addresses[leader], token)

    def _joined(self, video: Video, group: Group, root: int) -> DenoisingRun:
        """The run, after newcomers have got it from rank `root`."""
        state = None
        if group.rank == root:
            run = self._run or started(self._denoiser, video)
            text, negative = prompts(video)
            state = JoinState.of(run, text, negative, fps=8, frames=video.frames)
        state = share_state(group, root, state)
        return self._run or state.resume(self._denoiser)

    def _standing(self, broken: str | None = None, waited_s: float = 0.0) -> Played:
        if self._run is None:
            return Played(0, None, broken, waited_s)
        return Played(self._run.steps_done, self._run.latent.numpy(), broken, waited_s)


def prompts(video: Video) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(video.prompt, CAPTION_CHANNELS, generator=generator)
    negative = torch.randn(video.negative, CAPTION_CHANNELS, generator=generator) if video.negative else None
    return text, negative


def started(denoiser: Denoiser, video: Video) -> DenoisingRun:
    text, negative = prompts(video)
    return denoiser.start(
        text,
        negative,
        width=video.width,
        height=video.height,
        frames=video.frames,
        fps=8,
        steps=video.steps,
        guidance_scale=video.guidance_scale,
        seed=5,
    )


@torch.no_grad()
def forward(run: Callable[..., Tensor], model: STDiT3, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    text = model.prepare_text(tensors["y"], tensors["mask"])
    size = {"height": 20, "width": 36}
    return run(tensors["x"], tensors["t"], text, x_mask=tensors["x_mask"], fps=tensors["fps"], **size).numpy()


def work(connection: Connection, index: int, name: str, spec: VideoModelSpec) -> None:
    """The worker process: does what it is asked, one thing after the other."""
    worker = Worker(index, name, spec)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(worker, method)(*arguments)))
        except Exception as error:  # noqa: BLE001
            connection.send((False, f"{type(error).__name__}: {error}"))


# --- the test's side ---------------------------------------------------------------------------------------------


class Workers:
    """The four processes, by index."""

    def __init__(self, spec: VideoModelSpec) -> None:
        self._spec = spec
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[int, BaseProcess] = {}
        self._pipes: dict[int, Connection] = {}
        self._lives = 0
        self._token = 0
        self.names: dict[int, str] = {}
        self.start(*range(WORKERS))

    def start(self, *indices: int) -> None:
        for index in indices:
            # A worker that comes back is a new member: what is kept with its former self is worth nothing.
            self._lives += 1
            self.names[index] = f"dit-{index}.{self._lives}"
            ours, theirs = self._context.Pipe()
            arguments = (theirs, index, self.names[index], self._spec)
            self._processes[index] = self._context.Process(target=work, args=arguments, daemon=True)
            self._processes[index].start()
            theirs.close()
            self._pipes[index] = ours
        self._introduce()

    @contextlib.contextmanager
    def impatient(self) -> Iterator[None]:
        """They wait for each other for a short while only."""
        self._wait(IMPATIENCE_S)
        yield
        self._wait(PATIENCE_S)

    def _wait(self, seconds: float) -> None:
        for index in range(WORKERS):
            self.ask(index, "wait", seconds)
        self._introduce()

    def _introduce(self) -> None:
        everyone = range(WORKERS)
        for index in everyone:
            self._pipes[index].send(("address", ()))
        addresses = {index: str(self._answer(index, START_S)) for index in everyone}
        for index in everyone:
            self.ask(index, "know", self.names, addresses)

    def ask(self, index: int, method: str, *arguments: object) -> object:
        self._pipes[index].send((method, arguments))
        return self._answer(index)

    def play(
        self,
        video: Video,
        turns: Sequence[Turn],
        fates: Mapping[int, Fate] | None = None,
        resumed: bool = False,
        without: Sequence[int] = (),
    ) -> dict[int, Played]:
        """All workers play their parts; the struck ones have no answer."""
        fates = fates or {}
        self._token += len(turns)
        playing = [index for index in range(WORKERS) if index not in without]
        for index in playing:
            self._pipes[index].send(("play", (video, turns, self._token, fates.get(index), resumed)))
        answers = {index: self._answer(index) for index in playing if index not in fates}
        assert all(isinstance(answer, Played) for answer in answers.values())
        return answers  # type: ignore[return-value]

    def predict(
        self, members: tuple[int, ...], parallelism: Parallelism, arrays: dict[str, np.ndarray]
    ) -> list[np.ndarray]:
        self._token += 1
        for index in members:
            self._pipes[index].send(("predict", (members, parallelism, arrays, self._token)))
        return [self._answer(index) for index in members]  # type: ignore[misc]

    def answer_of(self, index: int) -> Played:
        answer = self._answer(index)
        assert isinstance(answer, Played)
        return answer

    def wake(self, index: int) -> None:
        process = self._processes[index]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGCONT)

    def bury(self, index: int) -> None:
        """Wait for a killed worker's end."""
        self._processes[index].join(WAIT_S)
        assert self._processes[index].exitcode == -signal.SIGKILL

    def _answer(self, index: int, within_s: float = WAIT_S) -> object:
        assert self._pipes[index].poll(within_s), f"worker {index} does not answer"
        succeeded, answer = self._pipes[index].recv()
        assert succeeded, f"worker {index}: {answer}"
        return answer

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join(WAIT_S)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> VideoModelSpec:
    """A small model whose heads divide by 2, 3 and 4."""
    folder: Path = tmp_path_factory.mktemp("model")
    config = STDiT3Config(
        hidden_size=48,
        depth=2,
        num_heads=12,
        caption_channels=CAPTION_CHANNELS,
        model_max_length=PROMPT_TOKENS,
        input_sq_size=32,
    )
    transformer = STDiT3(config).eval()
    randomise(transformer, seed=1, std=0.1)
    save_stdit3(transformer, folder / "transformer")
    vae = OpenSoraVAEConfig(
        spatial=SpatialVAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4),
        temporal=TemporalVAEConfig(filters=8, num_res_blocks=1, num_groups=4),
        micro_frame_size=9,
    )
    save_vae(OpenSoraVAE(vae), folder / "vae")
    return VideoModelSpec(
        name="small",
        text_encoder="none",
        transformer=str(folder / "transformer"),
        vae=str(folder / "vae"),
        sizes=((36, 20),),
        frames=(1, 17),
        defaults=VideoDefaults(size=(36, 20), frames=17, fps=8, steps=STEPS, guidance_scale=2.0),
        fps_range=(1, 30),
        steps_range=(1, 50),
        guidance_range=(1.0, 10.0),
        max_prompt_tokens=PROMPT_TOKENS,
        license="Apache-2.0",
    )


@pytest.fixture(scope="module")
def workers(spec: VideoModelSpec) -> Iterator[Workers]:
    running = Workers(spec)
    yield running
    running.stop()


class Alone:
    """One process, whose latents the others' must equal."""

    def __init__(self, spec: VideoModelSpec) -> None:
        torch.set_num_threads(1)
        self.denoiser = Denoiser(spec, "cpu")
        self._latents: dict[Video, Tensor] = {}

    def latent(self, video: Video) -> Tensor:
        if video not in self._latents:
            run = started(self.denoiser, video)
            noise = run.latent
            while not run.finished:
                run.step()
            assert run.latent.isfinite().all() and (run.latent - noise).abs().mean() > 0.1
            self._latents[video] = run.latent
        return self._latents[video]


@pytest.fixture(scope="module")
def alone(spec: VideoModelSpec) -> Alone:
    return Alone(spec)


def latents(played: Mapping[int, Played], members: Sequence[int], steps: int = STEPS) -> list[Tensor]:
    """The last group's latents: every member has all of it, and all have the same bits."""
    found = []
    for index in members:
        assert played[index].broken is None and played[index].steps_done == steps
        latent = played[index].latent
        assert latent is not None
        found.append(torch.from_numpy(latent))
    assert all(torch.equal(found[0], other) for other in found)
    return found


def check(played: Mapping[int, Played], members: Sequence[int], alone: Alone, video: Video) -> None:
    latent = latents(played, members, video.steps)[0]
    torch.testing.assert_close(latent, alone.latent(video), atol=ATOL, rtol=0.0)


@pytest.mark.parametrize("guidance", [False, True], ids=["whole batch", "guidance parallel"])
@pytest.mark.parametrize("sequence", [DSP, ULYSSES])
@pytest.mark.parametrize("members", [(0,), (1, 0), (2, 0, 1), (3, 1, 0, 2)], ids=len)
@pytest.mark.parametrize("video", VIDEOS.values(), ids=VIDEOS.keys())
def test_a_groups_latent_is_one_processs(
    workers: Workers,
    alone: Alone,
    video: Video,
    members: tuple[int, ...],
    sequence: SequenceParallelism,
    guidance: bool,
) -> None:
    turn = Turn(members, Parallelism(sequence, guidance))
    check(workers.play(video, [turn] * STEPS), members, alone, video)


@pytest.mark.parametrize("video", [VIDEOS["T5 S15"], VIDEOS["T4 S16 negative"]], ids=["equal", "unequal prompts"])
def test_guidance_parallel_is_bit_equal_to_one_process_that_takes_the_halves_in_turn(
    workers: Workers, alone: Alone, video: Video
) -> None:
    """With both halves in one batch the matrix kernels sum in another order, so that comparison has a tolerance."""
    run = started(alone.denoiser, video)
    while not run.finished:
        run.step(partial(one_row_at_a_time, alone.denoiser.model))
    played = workers.play(video, [Turn((0, 1))] * STEPS)
    assert torch.equal(latents(played, (0, 1))[0], run.latent)


def one_row_at_a_time(model: STDiT3, x: Tensor, t: Tensor, text: PreparedText, **others: object) -> Tensor:
    return torch.cat([model(x[row : row + 1], t[row : row + 1], text.rows(row, row + 1), **others) for row in (0, 1)])


@pytest.mark.parametrize("sequence", [DSP, ULYSSES])
@pytest.mark.parametrize("members", [(0, 1), (0, 1, 2, 3)], ids=len)
def test_frame_masks_and_frame_rates_belong_to_their_rows(
    workers: Workers, alone: Alone, members: tuple[int, ...], sequence: SequenceParallelism
) -> None:
    generator = torch.Generator().manual_seed(9)
    arrays = {
        "x": torch.randn(2, 4, 5, 5, 9, generator=generator).numpy(),
        "t": np.array([900.0, 300.0], dtype=np.float32),
        "y": torch.randn(2, 1, 8, CAPTION_CHANNELS, generator=generator).numpy(),
        "mask": np.arange(8)[None] < np.array([[8], [3]]),
        "x_mask": np.array([[True, False, True, True, True], [False, False, True, True, False]]),
        "fps": np.array([8.0, 24.0], dtype=np.float32),
    }
    model = alone.denoiser.model
    expected = forward(model, model, arrays)
    for guidance in (False, True):
        for predicted in workers.predict(members, Parallelism(sequence, guidance), arrays):
            np.testing.assert_allclose(predicted, expected, atol=ATOL, rtol=0.0)


@st.composite
def schedules(draw: st.DrawFn) -> list[Turn]:
    """A member set for each step; whoever stays has the state for those who come."""
    turns: list[Turn] = []
    for _ in range(STEPS):
        if turns and draw(st.booleans()):
            members, root = turns[-1].members, 0
        else:
            members = tuple(draw(st.permutations(range(WORKERS)))[: draw(st.sampled_from([1, 2, 4, 3]))])
            staying = [rank for rank, member in enumerate(members) if turns and member in turns[-1].members]
            if turns and not staying:
                members = (*members[:-1], turns[-1].members[0])
                staying = [len(members) - 1]
            root = draw(st.sampled_from(staying)) if staying else 0
        parallelism = Parallelism(draw(st.sampled_from([DSP, ULYSSES])), draw(st.booleans()))
        turns.append(Turn(members, parallelism, root))
    return turns


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=schedules(), video=st.sampled_from(list(VIDEOS.values())))
def test_members_come_and_go_between_steps(workers: Workers, alone: Alone, turns: list[Turn], video: Video) -> None:
    check(workers.play(video, turns), turns[-1].members, alone, video)


@pytest.mark.parametrize(
    ("parallelism", "exchange"),
    [
        (Parallelism(DSP, guidance=False), 2),
        (Parallelism(ULYSSES, guidance=True), 1),
        (Parallelism(DSP, guidance=True), 3),
    ],
    ids=["between blocks", "inside attention", "before the last exchange"],
)
def test_a_killed_member_breaks_the_group_and_not_the_others(
    workers: Workers, alone: Alone, parallelism: Parallelism, exchange: int
) -> None:
    video = Video()
    turns = [Turn((0, 1, 2, 3), parallelism)] * STEPS
    played = workers.play(video, turns, fates={3: Fate(2, exchange, signal.SIGKILL)})
    workers.bury(3)
    dead = workers.names[3]
    assert set(played) == {0, 1, 2}
    for survivor in played.values():
        assert survivor.broken is not None and dead in survivor.broken
        assert survivor.waited_s < PATIENCE_S
        assert survivor.steps_done == 2
    # No scheduler and no new process needed: those who are left go on at once from the latent that each has.
    survivors = [Turn((2, 0), parallelism)] * (STEPS - 2)
    check(workers.play(video, survivors, resumed=True, without=[3]), (2, 0), alone, video)
    for index in (0, 1, 2):
        workers.ask(index, "forget", dead)
    workers.start(3)
    check(workers.play(video, turns), (0, 1, 2, 3), alone, video)


def test_a_hanging_member_breaks_the_group_after_the_time_out(workers: Workers, alone: Alone) -> None:
    video = Video()
    turns = [Turn((0, 1, 2, 3), Parallelism(DSP, guidance=False))] * STEPS
    with workers.impatient():
        played = workers.play(video, turns, fates={2: Fate(1, 1, signal.SIGSTOP)})
        for survivor in played.values():
            assert survivor.broken is not None and survivor.steps_done == 1
        rest = [Turn((3, 1, 0), replace(turns[0].parallelism, sequence=ULYSSES))] * (STEPS - 1)
        check(workers.play(video, rest, resumed=True, without=[2]), (3, 1, 0), alone, video)
        # It wakes up to a group that went on without it, and is told so.
        workers.wake(2)
        woken = workers.answer_of(2)
        assert woken.broken is not None and woken.steps_done == 1
        check(workers.play(video, turns), (0, 1, 2, 3), alone, video)


def test_shares_are_even_and_complete() -> None:
    assert shares(405, 2) == [203, 202]
    assert shares(405, 4) == [102, 101, 101, 101]
    assert shares(5, 4) == [2, 1, 1, 1]
    assert shares(1, 2) == [1, 0]


def test_heads_that_do_not_divide_are_refused(alone: Alone) -> None:
    @dataclass
    class Five:
        rank: int = 0
        size: int = 5

    block = alone.denoiser.model.block_pairs()[0][0]
    with pytest.raises(ValueError, match="12 heads do not divide by 5 ranks; use dsp"):
        UlyssesAttention(block.attn, Five(), [1] * 5)  # type: ignore[arg-type]


def test_a_joining_workers_state_survives_its_message(alone: Alone) -> None:
    run = started(alone.denoiser, Video())
    run.step()
    text = torch.randn(7, CAPTION_CHANNELS).to(torch.bfloat16)
    for negative in (None, torch.randn(2, CAPTION_CHANNELS)):
        state = JoinState.of(run, text, negative, fps=23.976, frames=17)
        again = JoinState.unpack(state.pack())
        assert torch.equal(again.latent, state.latent) and torch.equal(again.text, text)
        assert (again.negative is None) == (negative is None)
        assert replace(again, latent=text, text=text, negative=None) == replace(
            state, latent=text, text=text, negative=None
        )
