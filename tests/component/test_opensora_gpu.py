"""The video model's own kernels on a GPU against torch's, at published widths. With gradients torch's do the work."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.opensora.attention import RotaryEmbedding
from common.models.opensora.blocks import STDiT3Block, StepConditions
from common.models.opensora.embeddings import Mlp
from common.models.opensora.gpu.graphs import CapturedSTDiT3
from common.models.opensora.gpu.kernels import gpu_kernels
from common.models.opensora.group_norm import norm_silu
from tests.support.small_model import small_stdit3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
WIDTH, HEADS, BATCH = 1152, 16, 2


def _error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def test_there_are_kernels() -> None:
    with torch.no_grad():
        assert gpu_kernels(torch.empty(1, device=DEVICE)) is not None
    assert gpu_kernels(torch.empty(1, device=DEVICE)) is None


@DTYPES
@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
@pytest.mark.parametrize("frames", [1, 15, 70])
@pytest.mark.parametrize("masked", [False, True], ids=["all frames", "some frames"])
def test_a_block_computes_what_torch_does(dtype: torch.dtype, temporal: bool, frames: int, masked: bool) -> None:
    torch.manual_seed(frames)
    patches, words = 37, 20
    block = STDiT3Block(WIDTH, HEADS, 4.0, qk_norm=True, temporal=temporal).to(DEVICE).eval()
    nn.init.normal_(block.attn.q_norm.weight, mean=1.0, std=0.2)  # type: ignore[arg-type]
    x = torch.randn(BATCH, frames * patches, WIDTH, device=DEVICE)
    text = tuple(torch.randn(BATCH, HEADS, words, WIDTH // HEADS, device=DEVICE) for _ in range(2))
    embedding, modulation = (torch.randn(BATCH, *shape, device=DEVICE) for shape in ((WIDTH,), (6, WIDTH)))
    mask = torch.rand(BATCH, frames, device=DEVICE) < 0.5 if masked else None
    rope = RotaryEmbedding(WIDTH // HEADS).to(DEVICE)(frames) if temporal else None

    def run(kind: torch.dtype) -> Tensor:
        cast = [each.to(kind) for each in (embedding, modulation, embedding, modulation)]
        conditions = StepConditions(*cast, mask) if masked else StepConditions(*cast[:2])
        prompt = text[0].to(kind), text[1].to(kind)
        out: Tensor = block(x.to(kind), prompt, None, conditions, frames, patches, rope)
        return out.detach()

    exact = run(torch.float32)
    block.to(dtype)
    plain = run(dtype)
    with torch.no_grad():
        ours = run(dtype)
    assert _error(ours, exact) <= max(1.1 * _error(plain, exact), 2e-6)


@DTYPES
def test_the_activation_within_the_product(dtype: torch.dtype) -> None:
    mlp = Mlp(WIDTH, 4 * WIDTH, WIDTH).to(DEVICE, dtype)
    x = torch.randn(2, 50, WIDTH, device=DEVICE, dtype=dtype)
    exact = F.linear(x.double(), mlp.fc1.weight.double(), mlp.fc1.bias.double())
    exact = F.linear(F.gelu(exact, approximate="tanh"), mlp.fc2.weight.double(), mlp.fc2.bias.double())
    with torch.no_grad():
        ours = mlp(x)
    assert _error(ours, exact) < (1e-5 if dtype is torch.float32 else 1e-2)


@DTYPES
@pytest.mark.parametrize(("shape", "groups"), [((4, 128, 60, 107), 32), ((1, 512, 5, 30, 53), 32), ((2, 8, 3, 5), 4)])
def test_group_norms(dtype: torch.dtype, shape: tuple[int, ...], groups: int) -> None:
    norm = nn.GroupNorm(groups, shape[1]).to(DEVICE)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 * torch.randn(shape, device=DEVICE) + 5).to(dtype)
    exact = F.silu(norm(x.float()))
    with torch.no_grad():
        ours = norm_silu(norm.to(dtype), x)
    assert _error(ours, exact) < (1e-5 if dtype is torch.float32 else 1e-2)


@torch.no_grad()
def test_captured_steps_are_those_that_are_not() -> None:
    model = small_stdit3().to(DEVICE).eval()
    captured = CapturedSTDiT3(model)
    prompts = [model.prepare_text(torch.randn(BATCH, 1, words, 24, device=DEVICE)) for words in (7, 3)]
    size = {"fps": 8.0, "height": 32.0, "width": 24.0}
    # Three steps of one video, four of another, the first again; the last of each is replayed for sure.
    for prompt, steps in ((prompts[0], 3), (prompts[1], 4), (prompts[0], 3)):
        for step in range(steps):
            x = torch.randn(BATCH, 4, 5, 8, 6, device=DEVICE)
            time = torch.full((BATCH,), 900.0 - 100 * step, device=DEVICE)
            still = prompt is prompts[1] and step == 1
            mask = torch.tensor([[True] * 4 + [False]] * BATCH, device=DEVICE) if still else None
            expected = model(x, time, prompt, x_mask=mask, **size)
            assert _error(captured(x, time, prompt, x_mask=mask, **size), expected) < 1e-6
