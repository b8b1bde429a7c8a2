"""The models that are measured, with random weights: Open-Sora 1.2 at its published size, and a tiny likeness."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.models.opensora import OpenSoraVAE, OpenSoraVAEConfig, PreparedText, RectifiedFlow, STDiT3, STDiT3Config
from common.models.opensora.loading import cast_weights
from common.models.opensora.pipeline import fill_edges, to_pixels
from common.models.opensora.spec import OPEN_SORA_1_2
from common.models.opensora.vae_config import SpatialVAEConfig, TemporalVAEConfig

# What torch.compile takes: a name, or what it hands the graphs to.
Backend = str | Callable[..., object]
# The prompt, and beside it the null caption.
GUIDED_ROWS = 2


@dataclass(frozen=True)
class Setup:
    """sizes: (width, height) in pixels by name; frames: of each video; text_tokens: of the prompt."""

    name: str
    sizes: Mapping[str, tuple[int, int]]
    frames: int
    text_tokens: int
    transformer: STDiT3Config = field(default_factory=STDiT3Config)
    vae: OpenSoraVAEConfig = field(default_factory=OpenSoraVAEConfig)

    def latent_shape(self, size: str) -> tuple[int, int, int, int, int]:
        """(1, C, t, h, w) of a video of that size."""
        width, height = self.sizes[size]
        return 1, self.transformer.in_channels, *self.vae.latent_size(self.frames, height, width)

    def grid(self, size: str) -> tuple[int, int]:
        """Frames of the token grid, and patches of each."""
        sides = zip(self.latent_shape(size)[2:], self.transformer.patch_size, strict=True)
        frames, rows, columns = (-(-side // patch) for side, patch in sides)
        return frames, rows * columns


# The longest prompt that the model reads: a shorter one costs a little less.
PUBLISHED = Setup(
    name="STDiT3-XL/2",
    sizes={"144p": (256, 144), "240p": (426, 240), "360p": (640, 360), "720p": (1280, 720)},
    frames=OPEN_SORA_1_2.defaults.frames,
    text_tokens=OPEN_SORA_1_2.max_prompt_tokens,
)
# The same code within a second on a CPU. The second size is of odd sides, as 240p and 360p are.
TINY = Setup(
    name="tiny",
    sizes={"144p": (32, 16), "240p": (52, 28)},
    frames=17,
    text_tokens=6,
    transformer=STDiT3Config(hidden_size=48, depth=2, num_heads=3, caption_channels=24, model_max_length=12),
    vae=OpenSoraVAEConfig(
        spatial=SpatialVAEConfig(block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4),
        temporal=TemporalVAEConfig(filters=8, num_res_blocks=1, num_groups=4),
        micro_frame_size=9,
        micro_batch_size=2,
    ),
)


def random_transformer(setup: Setup, device: torch.device, dtype: torch.dtype) -> STDiT3:
    """No matrix is zero, though training starts from some: zeros draw less power than a model at work."""
    with torch.device(device):
        model = STDiT3(setup.transformer)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return cast_weights(model.eval(), dtype)


def random_vae(setup: Setup, device: torch.device, dtype: torch.dtype) -> OpenSoraVAE:
    with torch.device(device):
        return cast_weights(OpenSoraVAE(setup.vae).eval(), dtype)


class GuidedStep:
    """One denoising step as a DiT worker takes it alone; the latent stays, as random weights would blow it up.

    run: another way to run the model.
    """

    def __init__(
        self, setup: Setup, size: str, model: STDiT3, device: torch.device, run: Callable[..., Tensor] | None = None
    ) -> None:
        self._run = run or model
        self._flow = RectifiedFlow(**asdict(OPEN_SORA_1_2.flow))
        width, height = setup.sizes[size]
        self._size = {"height": float(height), "width": float(width)}
        self._times = self._flow.timesteps(OPEN_SORA_1_2.defaults.steps, height, width, setup.frames)
        self._latent = torch.randn(setup.latent_shape(size), device=device)
        prompts = torch.randn(GUIDED_ROWS, 1, setup.text_tokens, setup.transformer.caption_channels, device=device)
        with torch.no_grad():
            self._text = model.prepare_text(prompts)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        defaults = OPEN_SORA_1_2.defaults

        def velocity(z: Tensor, t: Tensor, text: PreparedText, frame_mask: Tensor | None) -> Tensor:
            predicted: Tensor = self._run(z, t, text, x_mask=frame_mask, fps=defaults.fps, **self._size)
            return predicted

        return self._flow.step(velocity, self._latent, 0, self._times, self._text, defaults.guidance_scale)


def decode_flops(setup: Setup, size: str) -> int:
    """Operations of decoding one video, nearly all of them convolutions, as torch counts them; nothing is computed."""
    with torch.device("meta"):
        vae = OpenSoraVAE(setup.vae).eval()
        latent = torch.empty(setup.latent_shape(size))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for _ in vae.decode_chunks(latent, setup.frames):
            pass
    return int(counter.get_total_flops())


class Decoding:
    """One video from latent to pixels in main memory as a VAE worker decodes it: chunk by chunk."""

    def __init__(self, setup: Setup, size: str, vae: OpenSoraVAE, device: torch.device) -> None:
        self._vae = vae
        self._frames = setup.frames
        self._width, self._height = setup.sizes[size]
        self._latent = torch.randn(setup.latent_shape(size), device=device)

    @torch.no_grad()
    def __call__(self) -> None:
        for chunk in self._vae.decode_chunks(self._latent, self._frames):
            to_pixels(fill_edges(chunk[0], self._height, self._width))


def compile_transformer(model: STDiT3, backend: Backend) -> None:
    """Block by block: what is compiled for one spatial and one temporal block serves all of them."""
    blocks = [block for pair in model.block_pairs() for block in pair]
    _compile(blocks, backend)


def compile_vae(vae: OpenSoraVAE, backend: Backend) -> None:
    """Both decoders, each as a whole."""
    _compile([vae.spatial_vae.module.decoder, vae.temporal_vae.decoder], backend)


def _compile(modules: Sequence[torch.nn.Module], backend: Backend) -> None:
    for module in modules:
        module.compile(fullgraph=True, dynamic=False, backend=backend)
