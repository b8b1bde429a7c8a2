"""The temporal VAE and the whole autoencoder against the published code."""

import pytest
import torch

from common.models.opensora import OpenSoraVAE, OpenSoraVAEConfig
from common.models.opensora.temporal_vae import TemporalVAE
from common.models.opensora.vae_config import TemporalVAEConfig
from tests.golden.support import cases, golden, tensors

TEMPORAL = golden("vae_temporal")
PIPELINE = golden("vae_pipeline")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def temporal_config(values: dict) -> TemporalVAEConfig:
    return TemporalVAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@pytest.fixture(scope="module")
def temporal() -> TemporalVAE:
    model = TemporalVAE(temporal_config(TEMPORAL["config"])).eval()
    model.load_state_dict(tensors("vae_temporal", "weights.safetensors"), strict=True)
    return model


@pytest.fixture(scope="module")
def vae() -> OpenSoraVAE:
    config = OpenSoraVAEConfig.from_dict(
        {
            "vae_2d": {"type": "VideoAutoencoderKL", "micro_batch_size": 4, "config": PIPELINE["spatial_config"]},
            "vae_temporal": {"type": "VAE_Temporal", "config": PIPELINE["temporal_config"]},
            **{name: PIPELINE[name] for name in ("micro_frame_size", "shift", "scale")},
        }
    )
    model = OpenSoraVAE(config).eval()
    model.load_state_dict(tensors("vae_pipeline", "weights.safetensors"), strict=True)
    return model


@pytest.mark.parametrize("name", cases("vae_temporal"))
@torch.no_grad()
def test_temporal_encode_and_decode(temporal, name):
    arrays = tensors("vae_temporal", f"case_{name}.safetensors")
    tolerance = TEMPORAL["suggested_tolerance"]
    frames = arrays["in.x"].shape[2]
    posterior = temporal.encode(arrays["in.x"])
    torch.testing.assert_close(posterior.mean, arrays["out.mean"], **tolerance)
    torch.testing.assert_close(posterior.logvar, arrays["out.logvar"], **tolerance)
    recon = temporal.decode(posterior.mean, frames)
    torch.testing.assert_close(recon, arrays["out.recon_from_mean"], **tolerance)
    torch.testing.assert_close(temporal.decode(arrays["in.z"], frames), arrays["out.decode_z"], **tolerance)


def test_temporal_latent_frames(temporal):
    for frames, latent in TEMPORAL["latent_frames"].items():
        assert temporal.config.latent_frames(int(frames)) == latent


@pytest.mark.parametrize("name", cases("vae_pipeline"))
@torch.no_grad()
def test_decode(vae, name):
    arrays = tensors("vae_pipeline", f"case_{name}.safetensors")
    video = vae.decode(arrays["in.z"], arrays["out.video"].shape[2])
    torch.testing.assert_close(video, arrays["out.video"], **PIPELINE["suggested_tolerance"])
