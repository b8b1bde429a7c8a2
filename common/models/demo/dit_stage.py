"""Training the diffusion transformer on encoded clips, jointly with the text encoder that reads their captions."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from common.models.demo.captions import training_caption
from common.models.demo.clips import FPS
from common.models.demo.dataset import EncodedBucket, LatentBatches
from common.models.demo.loop import Budget, Stage, run, split_parameters, torch_generator_of
from common.models.demo.optim import Average, Optimiser
from common.models.demo.parallel import Workers
from common.models.demo.precision import mixed_precision
from common.models.demo.settings import CAPTION_CHANNELS, DIT, MAX_PROMPT_TOKENS
from common.models.demo.tokenizer import END, PAD
from common.models.opensora.rectified_flow import RectifiedFlow
from common.models.opensora.stdit3 import STDiT3

_TOKENS_PER_STEP = 3072
_CAPTION_DROPOUT = 0.1
# Towards the noise, where a clip's motion is decided: few degrees of freedom show through much of it.
_NOISE_CENTRE, _NOISE_WIDTH = 0.6, 1.3
_SMALLEST_GRID = 16
_KEPT_FROM_MUON = ("text.", "embedder", "t_block", "final_layer", "scale_shift_table")


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """A T5 encoder of two small layers."""
    config = T5Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        d_model=CAPTION_CHANNELS,
        d_kv=24,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


@dataclass
class DiTModels:
    """The two models trained together, and the tokenizer in front of them."""

    dit: STDiT3
    text: T5EncoderModel
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerFast, seed: int) -> "DiTModels":
        torch.manual_seed(seed)
        return cls(STDiT3(DIT), build_text_encoder(tokenizer), tokenizer)

    def module(self) -> nn.ModuleDict:
        return nn.ModuleDict({"dit": self.dit, "text": self.text})

    def embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(states [B, 1, L, C], mask [B, L]) of captions, L the longest one's tokens."""
        tokens = self.tokenizer(
            captions, padding=True, truncation=True, max_length=MAX_PROMPT_TOKENS, return_tensors="pt"
        ).to(self.dit.y_embedder.y_embedding.device)
        states = self.text(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return states[:, None], tokens["attention_mask"]


def train_dit(
    models: DiTModels,
    encoded: list[EncodedBucket],
    folder: Path,
    budget: Budget,
    seed: int,
    device: torch.device,
    resume: bool,
    workers: Workers,
) -> None:
    """Train with the velocity loss of rectified flow; the models hold the averaged weights afterwards."""
    module = models.module().to(device).train()
    batches = LatentBatches(encoded, _TOKENS_PER_STEP // workers.count)
    flow = RectifiedFlow()

    def loss_of(rng: np.random.Generator, progress: float) -> Tensor:
        bucket, latents, subjects = batches.draw(rng, progress)
        generator = torch_generator_of(rng)
        states, mask = models.embed([training_caption(subject, rng) for subject in subjects])
        dropped = torch.from_numpy(rng.random(len(subjects)) < _CAPTION_DROPOUT)[:, None, None, None].to(device)
        states = torch.where(dropped, models.dit.null_embedding(len(subjects), states.shape[2]), states)
        centre = _NOISE_CENTRE + 0.25 * math.log(bucket.width * bucket.height / 256 / _SMALLEST_GRID)
        times = flow.sample_timesteps(len(subjects), generator, "logit-normal", centre, _NOISE_WIDTH).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)

        def velocity(noisy: Tensor, timesteps: Tensor) -> Tensor:
            size = {"height": bucket.height, "width": bucket.width}
            predicted: Tensor = models.dit(noisy, timesteps, states, mask, fps=FPS, **size)
            return predicted.float()

        with mixed_precision(device):
            return flow.training_losses(velocity, latents.to(device), times, noise).mean()

    matrices, others = split_parameters(module, _KEPT_FROM_MUON)
    optimiser = Optimiser(matrices, others, matrix_lr=0.012, other_lr=1.2e-3, workers=workers)
    run(Stage("dit", budget, module, optimiser, Average(module, 0.998), loss_of, seed, workers), folder, resume)
    module.eval()


def load_dit(models: DiTModels, folder: Path) -> None:
    """The averaged weights of the last checkpoint."""
    state = torch.load(folder / "dit.pt", map_location="cpu", weights_only=True)
    models.module().load_state_dict(state["average"]["values"])
