"""Writes the trained parts as a model folder: model_index.json, text_encoder, transformer, vae, in half precision."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common.models.demo.clips import FPS, FRAME_COUNTS, SIZES
from common.models.demo.dit_stage import DiTModels
from common.models.demo.settings import MAX_PROMPT_TOKENS
from common.models.opensora.loading import save_stdit3, save_vae
from common.models.opensora.spec import VideoDefaults, VideoModelSpec, save_spec
from common.models.opensora.vae import OpenSoraVAE

WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the shipped model."""
NAME = "triptych-demo"


def demo_spec() -> VideoModelSpec:
    """What the demo model can be asked for."""
    return VideoModelSpec(
        name=NAME,
        text_encoder="text_encoder",
        transformer="transformer",
        vae="vae",
        sizes=SIZES,
        frames=FRAME_COUNTS,
        defaults=VideoDefaults(size=(128, 128), frames=32, fps=FPS, steps=30, guidance_scale=3.0),
        fps_range=(1, 30),
        steps_range=(4, 100),
        guidance_range=(1.0, 8.0),
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        license="Apache-2.0",
    )


def export(vae: OpenSoraVAE, statistics: tuple[Tensor, Tensor], models: DiTModels, folder: Path) -> None:
    """Write the model folder. statistics: mean and deviation [C] of the latents, which become shift and scale."""
    shift, scale = (tuple(float(value) for value in values) for values in statistics)
    normalised = OpenSoraVAE(replace(vae.config, shift=shift, scale=scale))
    state = {name: value for name, value in vae.state_dict().items() if name not in ("shift", "scale")}
    normalised.load_state_dict({**normalised.state_dict(), **state})
    folder.mkdir(parents=True, exist_ok=True)
    save_vae(normalised, folder / "vae", torch.float16)
    save_stdit3(models.dit, folder / "transformer", torch.float16)
    text_folder = folder / "text_encoder"
    models.text.to("cpu", torch.float16).save_pretrained(text_folder)
    models.text.to(torch.float32)
    models.tokenizer.save_pretrained(text_folder)
    save_spec(demo_spec(), folder)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
