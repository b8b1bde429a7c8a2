"""The model and its groups on each kind of device: the CPU's half everywhere, the GPU's with ``make gpu-check``."""

import contextlib
import multiprocessing
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.models.opensora import STDiT3, STDiT3Config
from common.models.opensora.parallel import Parallelism, ParallelSTDiT3, SequenceParallelism
from common.models.opensora.pipeline import Denoiser, FrameDecoder, OpenSoraPipeline, PromptEncoder
from common.models.opensora.spec import VideoModelSpec, load_spec
from common.parallel.groups import Groups
from common.parallel.transport import BackendName
from common.runtime.settings import WorkerSettings
from common.runtime.worker import choose_precision
from tests.golden.support import cases, golden, inputs, tensors
from tests.support.small_model import save_small_model, small_stdit3
from tests.support.stack import running_stack

GPUS = torch.cuda.device_count()
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no CUDA device")])
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
WAIT_S = 240.0
PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> VideoModelSpec:
    return load_spec(save_small_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """Convolutions on a GPU would otherwise round float32 to ten bits first."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@DEVICES
@pytest.mark.parametrize("name", cases("stdit3"))
@torch.no_grad()
def test_the_transformer_matches_the_published_code(device: str, name: str) -> None:
    reference = golden("stdit3")
    model = STDiT3(STDiT3Config.from_dict(reference["config"])).eval()
    model.load_state_dict(tensors("stdit3", "weights.safetensors"))
    arrays = tensors("stdit3", f"case_{name}.safetensors")
    out = model.to(device)(**{key: value.to(device) for key, value in inputs(arrays).items()})
    tolerance = reference["suggested_tolerance"]
    if device != "cpu":
        # The reference was made on a CPU: a GPU adds in another order.
        tolerance = {**tolerance, "atol": 3 * tolerance["atol"]}
    torch.testing.assert_close(out.cpu(), arrays["out"], **tolerance)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_video_is_nearly_the_one_of_float32_on_a_cpu(spec: VideoModelSpec, device: str, dtype: torch.dtype) -> None:
    expected = OpenSoraPipeline(spec).generate(PROMPT, seed=7, width=48, height=32)
    made = OpenSoraPipeline(spec, device, dtype).generate(PROMPT, seed=7, width=48, height=32)
    assert made.latent.dtype == torch.float32 and made.latent.device.type == device
    error = (made.latent.cpu() - expected.latent).norm() / expected.latent.norm()
    assert error < (1e-4 if dtype is torch.float32 else 0.05)
    assert made.frames.shape == expected.frames.shape


class _NoQuestions(TorchDispatchMode):
    """Refuses whatever would have the host wait for a value that a GPU has yet to compute."""

    ASKING = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.name().split(".")[0] not in self.ASKING, f"a step asks for a value: {func.name()}"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Within the block the host only queues work."""
    if device == "cpu":
        with _NoQuestions():
            yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        # It says of itself that it does not notice everything.
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DEVICES
@pytest.mark.parametrize("negative_tokens", [7, 3], ids=["no mask", "masked text"])
def test_a_step_is_queued_without_waiting(spec: VideoModelSpec, device: str, negative_tokens: int) -> None:
    denoiser = Denoiser(spec, device, torch.bfloat16)
    text, negative = torch.randn(7, 24), torch.randn(negative_tokens, 24)
    size = {"width": 48, "height": 32, "frames": 13, "fps": 8}
    run = denoiser.start(text, negative, **size, steps=3, guidance_scale=2.0, seed=1)
    run.step()  # makes the tables of positions
    with no_waiting(device):
        run.step()
    assert run.latent.isfinite().all()


@DEVICES
def test_every_part_takes_the_precision_it_is_given(spec: VideoModelSpec, device: str) -> None:
    settings = WorkerSettings(_env_file=None)
    auto = choose_precision(settings, torch.device(device))
    assert auto is (torch.float32 if device == "cpu" else torch.bfloat16)
    asked = settings.model_copy(update={"precision": "bfloat16"})
    dtype = choose_precision(asked, torch.device(device))
    (text,) = PromptEncoder(spec, device, dtype).encode([PROMPT])
    assert text.dtype == torch.float32
    assert Denoiser(spec, device, dtype).model.dtype is dtype
    decoder = FrameDecoder(spec, device, dtype)
    latent = torch.randn(1, 4, *decoder._vae.latent_size(13, 32, 32))
    assert sum(len(chunk) for chunk in decoder.decode(latent, 13, 32, 32)) == 13


# --- groups ------------------------------------------------------------------------------------------------------

TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="NCCL takes a GPU for each member: needs two")]
MEMBERS = ("a", "b")


def _member(rank: int, backend: BackendName, pipe: Connection) -> None:
    """One of two: exchanges of each kind, then a step in each form, which must be what the model alone predicts."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    groups = Groups(MEMBERS[rank], backend=backend, device=device, exchange_timeout_s=60, meeting_timeout_s=60)
    pipe.send(groups.address)
    group = groups.enter(MEMBERS, pipe.recv(), 1)
    mine = torch.full((2, 3), float(rank), device=device)
    gathered = group.all_gather(mine)
    swapped = group.all_to_all([mine[:1], mine], [(1 + rank, 3)] * 2)
    told = group.broadcast(torch.full((2,), rank, device=device), root=1)
    exchanged = (
        [piece.device == device and piece.unique().tolist() == [other] for other, piece in enumerate(gathered)]
        + [piece.shape == (1 + rank, 3) and piece.unique().tolist() == [other] for other, piece in enumerate(swapped)]
        + [told.tolist() == [1, 1], group.agree(5 + rank) == 5, group.compare(rank) == [0, 1]]
    )
    pipe.send((exchanged, [_error(group, parallelism, device) for parallelism in FORMS]))
    pipe.recv()
    groups.close()


FORMS = (
    Parallelism(SequenceParallelism.DSP, guidance=False),
    Parallelism(SequenceParallelism.DSP, guidance=True),
)


@torch.no_grad()
def _error(group, parallelism: Parallelism, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    model = small_stdit3().to(device)
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(2, 4, 5, 8, 6, generator=generator), torch.randn(2, 1, 7, 24, generator=generator)
    text = model.prepare_text(y.to(device))
    arguments = (x.to(device), torch.full((2,), 500.0, device=device), text)
    size = {"fps": 8.0, "height": 32.0, "width": 24.0}
    alone: Tensor = model(*arguments, **size)
    together = ParallelSTDiT3(model).on(group, parallelism)(*arguments, **size)
    return float((together - alone).abs().max() / alone.abs().max())


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=TWO_GPUS)])
def test_two_processes_exchange_and_take_a_step_together(backend: BackendName) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in MEMBERS]
    processes = [
        context.Process(target=_member, args=(rank, backend, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    ours = [pipe for pipe, _ in pipes]
    try:
        for process in processes:
            process.start()
        address, _ = (_answer(pipe) for pipe in ours)
        for pipe in ours:
            pipe.send(address)
        for pipe in ours:
            exchanged, errors = _answer(pipe)
            assert all(exchanged), exchanged
            assert max(errors) < 1e-4, errors
        for pipe in ours:
            pipe.send("both are done")
        for process in processes:
            process.join(WAIT_S)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


def _answer(pipe: Connection):  # type: ignore[no-untyped-def]
    assert pipe.poll(WAIT_S), "a member does not answer"
    return pipe.recv()


# --- the whole stack ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="no CUDA device")
def test_the_stack_makes_a_video_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_DEVICE", "auto")
    with running_stack() as running:
        members = running.json("GET", "/v1/cluster")["members"]
        workers = [member for member in members if member["service"] in ("encoder", "dit", "vae")]
        assert workers and all(member["device"].startswith("cuda") for member in workers)
        video = running.order(prompt=PROMPT, seed=1, steps=4)
        assert running.completed(video)[4:8] == b"ftyp"
