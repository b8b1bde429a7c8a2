"""A video model with random weights, made on the spot: for measuring at sizes that the shipped model does not make.

It is a whole model folder, so that the stack serves it like any other; its text encoder is the shipped model's. What
it makes is noise, but steps, decoding and files take what they take with trained weights of the same shape.
"""

from pathlib import Path

import torch

from common.models.opensora import OpenSoraVAE, OpenSoraVAEConfig, STDiT3, STDiT3Config
from common.models.opensora.loading import read_stdit3_config, save_stdit3, save_vae
from common.models.opensora.spec import VideoDefaults, VideoModelSpec, load_spec, save_spec
from common.models.opensora.vae_config import SpatialVAEConfig, TemporalVAEConfig

# 8 latent frames of 64, 256 and 384 patches: 512, 2,048 and 3,072 tokens. The autoencoder halves the frames and takes
# 4x4 pixels to one, less than published ones do: as many tokens of fewer pixels, so that steps are most of the work.
SIZES = ((64, 64), (128, 128), (192, 128))
FRAMES = 16


def save_random_model(folder: Path, hidden: int = 128, depth: int = 2) -> Path:
    """Write the model into ``folder``; the transformer has ``depth`` pairs of blocks of ``hidden`` channels."""
    shipped = load_spec("demo")
    torch.manual_seed(1)
    transformer = STDiT3Config(
        hidden_size=hidden,
        depth=depth,
        num_heads=4,
        caption_channels=read_stdit3_config(Path(shipped.transformer)).caption_channels,
        model_max_length=shipped.max_prompt_tokens,
    )
    save_stdit3(STDiT3(transformer).eval(), folder / "transformer")
    vae = OpenSoraVAEConfig(
        spatial=SpatialVAEConfig(
            block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
        ),
        temporal=TemporalVAEConfig(
            filters=8,
            num_res_blocks=1,
            channel_multipliers=(1, 1, 2),
            temporal_downsample=(False, True),
            num_groups=4,
        ),
        micro_frame_size=16,
        micro_batch_size=None,
    )
    save_vae(OpenSoraVAE(vae).eval(), folder / "vae")
    save_spec(
        VideoModelSpec(
            name="random",
            text_encoder=shipped.text_encoder,
            transformer="transformer",
            vae="vae",
            sizes=SIZES,
            frames=(FRAMES,),
            defaults=VideoDefaults(size=SIZES[0], frames=FRAMES, fps=8, steps=10, guidance_scale=2.0),
            fps_range=(1, 30),
            steps_range=(1, 100),
            guidance_range=(1.0, 10.0),
            max_prompt_tokens=shipped.max_prompt_tokens,
            license="Apache-2.0",
        ),
        folder,
    )
    return folder
