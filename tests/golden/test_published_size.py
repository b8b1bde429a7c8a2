"""The published Open-Sora 1.2 models, by shape alone: nothing is allocated."""

import pytest
import torch

from common.models.opensora import OpenSoraVAE, OpenSoraVAEConfig, STDiT3, STDiT3Config

# config.json of hpcai-tech/OpenSora-STDiT-v3
STDIT3 = {
    "architectures": ["STDiT3"],
    "caption_channels": 4096,
    "class_dropout_prob": 0.1,
    "depth": 28,
    "drop_path": 0.0,
    "enable_flash_attn": True,
    "enable_layernorm_kernel": True,
    "enable_sequence_parallelism": False,
    "freeze_y_embedder": True,
    "hidden_size": 1152,
    "in_channels": 4,
    "input_size": [None, None, None],
    "input_sq_size": 512,
    "mlp_ratio": 4.0,
    "model_max_length": 300,
    "model_type": "STDiT3",
    "num_heads": 16,
    "only_train_temporal": False,
    "patch_size": [1, 2, 2],
    "pred_sigma": True,
    "qk_norm": True,
    "skip_y_embedder": False,
    "torch_dtype": "float32",
    "transformers_version": "4.36.2",
}
# config.json of hpcai-tech/OpenSora-VAE-v1.2
VAE = {
    "architectures": ["VideoAutoencoderPipeline"],
    "cal_loss": False,
    "freeze_vae_2d": False,
    "from_pretrained": None,
    "micro_frame_size": 17,
    "model_type": "VideoAutoencoderPipeline",
    "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.1, 0.34, 0.27, 0.98],
    "torch_dtype": "float32",
    "transformers_version": "4.36.2",
    "vae_2d": {
        "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        "local_files_only": False,
        "micro_batch_size": 4,
        "subfolder": "vae",
        "type": "VideoAutoencoderKL",
    },
    "vae_temporal": {"from_pretrained": None, "type": "VAE_Temporal_SD"},
}


def test_stdit3_xl_2():
    with torch.device("meta"):
        model = STDiT3(STDiT3Config.from_dict(STDIT3))
    state = model.state_dict()
    assert len(state) == 973
    assert state["y_embedder.y_embedding"].shape == (300, 4096)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6, 1) == 1207.6


def test_the_published_configs_are_the_defaults():
    assert STDiT3Config.from_dict(STDIT3) == STDiT3Config()
    assert OpenSoraVAEConfig.from_dict(VAE) == OpenSoraVAEConfig()


def test_vae_v1_2_has_the_keys_of_sdxls():
    autoencoder_kl = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl")
    with torch.device("meta"):
        model = OpenSoraVAE(OpenSoraVAEConfig.from_dict(VAE))
        sdxl = autoencoder_kl.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=32,
            sample_size=1024,
        )
    prefix = "spatial_vae.module."
    ours = {k.removeprefix(prefix): v.shape for k, v in model.state_dict().items() if k.startswith(prefix)}
    assert ours == {name: value.shape for name, value in sdxl.state_dict().items()}
    assert model.latent_size(51, 240, 426) == (15, 30, 53)
