"""Everything STDiT3 turns into vectors before its blocks: patches, positions, timesteps, frame rate, captions.

Module and parameter names are those of the published Open-Sora 1.2 checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.opensora.gpu.kernels import gpu_kernels

_MAX_CACHED_TABLES = 64


class PatchEmbed3D(nn.Module):
    """Latent video [B, C_in, T, H, W] to tokens [B, N, C], one token per patch, zero-padded to whole patches."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The token grid (T, H, W) of a latent of that size."""
        patch_t, patch_h, patch_w = self.patch_size
        return -(-frames // patch_t), -(-height // patch_h), -(-width // patch_w)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        patch_t, patch_h, patch_w = self.patch_size
        grid_t, grid_h, grid_w = self.grid(frames, height, width)
        pad = (0, grid_w * patch_w - width, 0, grid_h * patch_h - height, 0, grid_t * patch_t - frames)
        if any(pad):
            x = F.pad(x, pad)
        # A convolution whose stride is its kernel is one matrix product, and much faster as one on a CPU.
        x = x.reshape(batch, channels, grid_t, patch_t, grid_h, patch_h, grid_w, patch_w)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, grid_t * grid_h * grid_w, -1)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class PositionEmbedding2D(nn.Module):
    """Sine and cosine table [1, H*W, C] of a token grid; the first half of C tells x, the second y.

    Coordinates are divided by `scale` (picture size over the size the model was trained at) and stretched to a
    square of `base_size` tokens a side, so that every aspect ratio spans the same range.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self._tables: dict[tuple[object, ...], Tensor] = {}

    def forward(
        self, height: int, width: int, scale: float, base_size: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        key = (height, width, scale, base_size, device, dtype)
        table = self._tables.get(key)
        if table is None:
            if len(self._tables) >= _MAX_CACHED_TABLES:
                self._tables.clear()
            # A table made inside inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                table = self._table(height, width, scale, base_size).to(device=device, dtype=dtype)
            self._tables[key] = table
        return table

    def _table(self, height: int, width: int, scale: float, base_size: int) -> Tensor:
        half = self.hidden_size // 2
        with torch.device("cpu"):
            frequencies = 1.0 / (10000 ** (torch.arange(0, half, 2).float() / half))
            rows = torch.arange(height) / scale * (base_size / height)
            columns = torch.arange(width) / scale * (base_size / width)
        grid_y, grid_x = torch.meshgrid(rows, columns, indexing="ij")
        angles_x = grid_x.reshape(-1, 1) * frequencies
        angles_y = grid_y.reshape(-1, 1) * frequencies
        return torch.cat((angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()), dim=-1)[None]


class TimestepEmbedder(nn.Module):
    """Scalars [B] to vectors [B, C]: 256 cosines and sines, then two layers. Also used for the frame rate."""

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.frequency_size = frequency_size

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, values: Tensor) -> Tensor:
        half = self.frequency_size // 2
        steps = torch.arange(half, dtype=torch.float32, device=values.device)
        angles = values.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        embedded: Tensor = self.mlp(waves.to(self.dtype))
        return embedded


class Mlp(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        if gpu_kernels(x) is not None:
            # On a GPU its activation is the tanh-approximated one, within the product itself.
            rows = torch._addmm_activation(self.fc1.bias, x.flatten(0, -2), self.fc1.weight.t(), use_gelu=True)
            hidden = rows.view(*x.shape[:-1], -1)
        else:
            hidden = F.gelu(self.fc1(x), approximate="tanh")
        projected: Tensor = self.fc2(hidden)
        return projected


class CaptionEmbedder(nn.Module):
    """Text encoder states [B, 1, L, C_text] to [B, 1, L, C]; holds the null caption `y_embedding` [L, C_text]."""

    y_embedding: Tensor

    def __init__(self, caption_channels: int, hidden_size: int, token_count: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)
        self.register_buffer("y_embedding", torch.randn(token_count, caption_channels) / caption_channels**0.5)

    def forward(self, caption: Tensor) -> Tensor:
        embedded: Tensor = self.y_proj(caption)
        return embedded
