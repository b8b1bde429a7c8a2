"""A whole small video model on disk: real code, real file formats, random weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging

from common.models.opensora import OpenSoraVAE, OpenSoraVAEConfig, STDiT3, STDiT3Config
from common.models.opensora.loading import save_stdit3, save_vae
from common.models.opensora.spec import VideoDefaults, VideoModelSpec, save_spec
from common.models.opensora.vae_config import SpatialVAEConfig, TemporalVAEConfig
from tests.golden.support import randomise

WORDS = ["a", "red", "blue", "circle", "square", "moves", "left", "right", "up", "down"]
PROMPT_TOKENS = 12


def small_stdit3() -> STDiT3:
    config = STDiT3Config(
        hidden_size=48,
        depth=2,
        num_heads=3,
        caption_channels=24,
        model_max_length=PROMPT_TOKENS,
        input_sq_size=32,
    )
    model = STDiT3(config).eval()
    randomise(model, seed=1)
    return model


def small_vae() -> OpenSoraVAE:
    config = OpenSoraVAEConfig(
        spatial=SpatialVAEConfig(block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4),
        temporal=TemporalVAEConfig(filters=8, num_res_blocks=1, num_groups=4),
        micro_frame_size=9,
        micro_batch_size=2,
    )
    model = OpenSoraVAE(config).eval()
    randomise(model, seed=2)
    return model


def save_small_model(folder: Path, text_seed: int = 3) -> Path:
    """Write a complete model: text encoder, tokenizer, transformer, VAE and its index."""
    transformers_logging.disable_progress_bar()
    save_stdit3(small_stdit3(), folder / "transformer")
    save_vae(small_vae(), folder / "vae")
    _save_text_encoder(folder / "text_encoder", text_seed)
    save_spec(
        VideoModelSpec(
            name="small",
            text_encoder="text_encoder",
            transformer="transformer",
            vae="vae",
            sizes=((32, 32), (48, 32)),
            frames=(1, 13),
            defaults=VideoDefaults(size=(32, 32), frames=13, fps=8, steps=3, guidance_scale=2.0),
            fps_range=(1, 30),
            steps_range=(1, 50),
            guidance_range=(1.0, 10.0),
            max_prompt_tokens=PROMPT_TOKENS,
            license="Apache-2.0",
        ),
        folder,
    )
    return folder


def _save_text_encoder(folder: Path, seed: int) -> None:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: index + 3 for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(vocabulary), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    T5EncoderModel(config).save_pretrained(folder)
