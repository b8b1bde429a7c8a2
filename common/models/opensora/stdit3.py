"""STDiT3, the diffusion transformer of Open-Sora 1.2: spatial and temporal blocks in turn.

Key names are the published checkpoints' own. The forward pass is three public parts (`embed`, the blocks,
`finish`), so that a group of workers can run the same model with its tokens split between them.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from common.models.opensora.attention import RotaryEmbedding
from common.models.opensora.blocks import FinalLayer, STDiT3Block, StepConditions
from common.models.opensora.embeddings import (
    CaptionEmbedder,
    PatchEmbed3D,
    PositionEmbedding2D,
    TimestepEmbedder,
)

_IGNORED_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "enable_flash_attn",
        "enable_layernorm_kernel",
        "enable_sequence_parallelism",
        "force_huggingface",
        "freeze_y_embedder",
        "model_type",
        "only_train_temporal",
        "torch_dtype",
        "transformers_version",
    }
)


@dataclass(frozen=True)
class STDiT3Config:
    """The published config.json, field by field. Sizes are in latent pixels, `input_sq_size` in pixels."""

    input_size: tuple[int | None, int | None, int | None] = (None, None, None)
    input_sq_size: int = 512
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    drop_path: float = 0.0
    caption_channels: int = 4096
    model_max_length: int = 300
    qk_norm: bool = True
    qk_norm_legacy: bool = False
    skip_y_embedder: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads) or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must divide by 4 and by twice num_heads {self.num_heads}")
        if self.skip_y_embedder:
            raise ValueError("skip_y_embedder is not supported: give forward() a PreparedText instead")
        if self.qk_norm_legacy:
            raise ValueError("qk_norm_legacy is not supported: no published Open-Sora 1.2 checkpoint uses it")

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "STDiT3Config":
        """Read a published config.json. Raises ValueError naming every key it does not know."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(config) - known - _IGNORED_KEYS)
        if unknown:
            raise ValueError(f"unknown STDiT3 config keys: {', '.join(unknown)}")
        values = {name: config[name] for name in known if name in config}
        for name in ("input_size", "patch_size"):
            value = values.get(name)
            if isinstance(value, list | tuple):
                if len(value) != 3:
                    raise ValueError(f"{name} must have three entries (frames, height, width), got {value}")
                values[name] = tuple(value)
        return cls(**values)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """The same as JSON values, with the architecture's name, as the published repositories write it."""
        return {"architectures": ["STDiT3"], "model_type": "STDiT3", **asdict(self)}

    @property
    def out_channels(self) -> int:
        return self.in_channels * 2 if self.pred_sigma else self.in_channels


@dataclass(frozen=True)
class PreparedText:
    """A batch of prompts as the blocks want it: made once per prompt, used in every step.

    keys_values: for each block in running order (spatial 0, temporal 0, spatial 1, ...) the keys and values,
    each [B, heads, L, head_dim]. mask: bool [B, 1, 1, L], None when every token counts.
    """

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor | None

    @property
    def batch(self) -> int:
        return self.keys_values[0][0].shape[0]

    def rows(self, start: int, stop: int) -> "PreparedText":
        """The prompts `start` to `stop` of the batch, as views."""
        return PreparedText(
            tuple((keys[start:stop], values[start:stop]) for keys, values in self.keys_values),
            None if self.mask is None else self.mask[start:stop],
        )


@dataclass(frozen=True)
class TokenGrid:
    """How one latent [B, C, frames, height, width] is laid out in tokens: T frames of H by W patches."""

    frames: int
    height: int
    width: int
    latent_size: tuple[int, int, int]

    @property
    def patches(self) -> int:
        return self.height * self.width


class STDiT3(nn.Module):
    """The transformer. Predicts the velocity of rectified flow (and, unused, a variance) for a noisy latent."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.rope = RotaryEmbedding(hidden // config.num_heads)
        self.pos_embed = PositionEmbedding2D(hidden)
        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, hidden)
        self.t_embedder = TimestepEmbedder(hidden)
        self.fps_embedder = TimestepEmbedder(hidden)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))
        self.y_embedder = CaptionEmbedder(config.caption_channels, hidden, config.model_max_length)
        self.spatial_blocks = self._blocks(temporal=False)
        self.temporal_blocks = self._blocks(temporal=True)
        self.final_layer = FinalLayer(hidden, math.prod(config.patch_size), config.out_channels)
        self.initialize_weights()

    def _blocks(self, temporal: bool) -> nn.ModuleList:
        config = self.config
        return nn.ModuleList(
            STDiT3Block(config.hidden_size, config.num_heads, config.mlp_ratio, config.qk_norm, temporal)
            for _ in range(config.depth)
        )

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every weight for training from scratch: temporal blocks and the output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1), generator=generator)
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        for embedding in (self.t_embedder, self.t_block, self.fps_embedder):
            for module in embedding.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
        width = self.config.hidden_size**-0.5
        for spatial, temporal in self.block_pairs():
            for block in (spatial, temporal):
                nn.init.normal_(block.scale_shift_table, std=width, generator=generator)
            for last in (temporal.attn.proj, temporal.cross_attn.proj, temporal.mlp.fc2):
                nn.init.zeros_(last.weight)
        nn.init.normal_(self.final_layer.scale_shift_table, std=width, generator=generator)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.normal_(self.y_embedder.y_embedding, std=self.config.caption_channels**-0.5, generator=generator)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    def null_embedding(self, batch: int = 1, length: int | None = None) -> Tensor:
        """The null caption of classifier-free guidance, [batch, 1, length, caption_channels]."""
        return self.y_embedder.y_embedding[:length].expand(batch, 1, -1, -1)

    def prepare_text(self, y: Tensor, mask: Tensor | None = None) -> PreparedText:
        """Do once what depends on the prompts alone: project them and make every block's keys and values.

        y: [B, 1, L, caption_channels]; mask: [B, L], or [R, L] with R dividing B, whose rows are then repeated;
        non-zero where a token counts. In eval mode tokens that no row uses are left out (the result is the same).
        """
        text = self.y_embedder(y.to(self.dtype)).squeeze(1)
        attention_mask: Tensor | None = None
        if mask is not None:
            if text.shape[0] % mask.shape[0] or mask.shape[-1] != text.shape[1]:
                raise ValueError(f"text mask {tuple(mask.shape)} does not fit y {tuple(y.shape)}")
            counted = mask.reshape(mask.shape[0], -1).to(text.device) != 0
            if not self.training:
                used = counted.any(dim=0)
                used[:1] |= ~used.any()  # attention needs a token to look at, even a masked one
                text, counted = text[:, used], counted[:, used]
            if self.training or not bool(counted.all()):
                attention_mask = counted.repeat(text.shape[0] // counted.shape[0], 1)[:, None, None]
        blocks = (block for pair in self.block_pairs() for block in pair)
        return PreparedText(tuple(block.cross_attn.keys_values(text) for block in blocks), attention_mask)

    def block_pairs(self) -> list[tuple[STDiT3Block, STDiT3Block]]:
        """(spatial, temporal) blocks in running order."""
        return list(zip(self.spatial_blocks, self.temporal_blocks, strict=True))  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | PreparedText,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | float | None = None,
        height: Tensor | float | None = None,
        width: Tensor | float | None = None,
    ) -> Tensor:
        """Predict for a noisy latent.

        x: [B, C, T, H, W]; timestep: [B] in 0..1000; y: prompts [B, 1, L, caption_channels] with `mask`
        (see `prepare_text`), or prepared ones; x_mask: bool [B, T], false for frames given as they are;
        fps: [B] or one number; height, width: the video's size in pixels. Returns float32 [B, C_out, T, H, W].
        """
        if fps is None or height is None or width is None:
            raise ValueError("STDiT3 needs fps, height and width (pixels of the video, not of the latent)")
        if self.training and self.config.drop_path > 0:
            raise ValueError("drop_path is not supported in training; set it to 0")
        text = y if isinstance(y, PreparedText) else self.prepare_text(y, mask)
        if text.batch != x.shape[0]:
            raise ValueError(f"{x.shape[0]} latents but {text.batch} prompts")
        tokens, grid = self.embed(x, float_value(height), float_value(width))
        conditions = self.conditions(timestep, fps, x_mask)
        rope = self.rope(grid.frames)
        for index, (spatial, temporal) in enumerate(self.block_pairs()):
            prompt = text.keys_values[2 * index]
            tokens = spatial(tokens, prompt, text.mask, conditions, grid.frames, grid.patches)
            prompt = text.keys_values[2 * index + 1]
            tokens = temporal(tokens, prompt, text.mask, conditions, grid.frames, grid.patches, rope)
        return self.finish(tokens, conditions, grid)

    def embed(self, x: Tensor, height: float, width: float) -> tuple[Tensor, TokenGrid]:
        """Latent [B, C, T, H, W] of a video of that size in pixels to positioned tokens [B, T*S, C]."""
        frames, rows, columns = self.x_embedder.grid(*x.shape[2:])
        grid = TokenGrid(frames, rows, columns, (x.shape[2], x.shape[3], x.shape[4]))
        scale = (height * width) ** 0.5 / self.config.input_sq_size
        base_size = round(grid.patches**0.5)
        positions = self.pos_embed(rows, columns, scale, base_size, x.device, self.dtype)
        tokens: Tensor = self.x_embedder(x.to(self.dtype))
        tokens = tokens.view(x.shape[0], frames, grid.patches, -1) + positions
        return tokens.flatten(1, 2), grid

    def conditions(self, timestep: Tensor, fps: Tensor | float, frame_mask: Tensor | None = None) -> StepConditions:
        """Timesteps [B] and frame rate as the blocks want them."""
        batch = timestep.shape[0]
        if isinstance(fps, Tensor):
            rate = fps.to(timestep.device, torch.float32).reshape(-1)
        else:
            # Written by the device itself: a number that is copied there waits for all that is queued.
            rate = torch.full((1,), fps, dtype=torch.float32, device=timestep.device)
        rate_embedding = self.fps_embedder(rate)
        rate_embedding = rate_embedding.repeat(batch // rate.shape[0], 1)
        embedding = self.t_embedder(timestep) + rate_embedding
        modulation = self.t_block(embedding).unflatten(-1, (6, -1))
        if frame_mask is None:
            return StepConditions(embedding, modulation)
        still = self.t_embedder(torch.zeros_like(timestep)) + rate_embedding
        return StepConditions(embedding, modulation, still, self.t_block(still).unflatten(-1, (6, -1)), frame_mask)

    def finish(self, tokens: Tensor, conditions: StepConditions, grid: TokenGrid) -> Tensor:
        """Tokens [B, T*S, C] back to a latent [B, C_out, T, H, W], float32, without the padding."""
        patches = self.final_layer(tokens, conditions, grid.frames, grid.patches)
        patch_t, patch_h, patch_w = self.config.patch_size
        x: Tensor = patches.view(
            -1, grid.frames, grid.height, grid.width, patch_t, patch_h, patch_w, self.config.out_channels
        )
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        frames, height, width = grid.latent_size
        return x[:, :, :frames, :height, :width].float()


def float_value(size: Tensor | float) -> float:
    """The first entry of a tensor, or the number itself: all rows of a batch have one size."""
    return float(size.flatten()[0]) if isinstance(size, Tensor) else float(size)
