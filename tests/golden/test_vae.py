"""The temporal VAE and the whole autoencoder against the published code."""

import pytest
import torch

from common.models.opensora import OpenSoraVAE, OpenSoraVAEConfig
from common.models.opensora.temporal_vae import TemporalVAE
from common.models.opensora.vae_config import TemporalVAEConfig
from tests.golden.support import cases, golden, tensors

TEMPORAL = golden("vae_temporal")
PIPELINE = golden("vae_pipeline")


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


def test_latent_sizes_of_the_published_model():
    config = OpenSoraVAEConfig()
    for video, latent in PIPELINE["latent_sizes"]:
        assert list(config.latent_size(*video)) == latent


@pytest.mark.parametrize("frames", [1, 4, 9, 13, 27])
@torch.no_grad()
def test_chunks_are_the_whole_bit_for_bit(small_vae, frames):
    generator = torch.Generator().manual_seed(frames)
    z = torch.randn(2, 4, *small_vae.latent_size(frames, 16, 24), generator=generator)
    chunks = list(small_vae.decode_chunks(z, frames))
    whole = small_vae.decode(z, frames)
    assert [chunk.shape[2] for chunk in chunks] == [count for count, _ in small_vae.config.chunks(frames)]
    assert whole.shape == (2, 3, frames, 16, 24)
    assert torch.equal(torch.cat(chunks, dim=2), whole)


@torch.no_grad()
def test_a_chunk_needs_no_other(small_vae):
    z = torch.randn(1, 4, *small_vae.latent_size(13, 16, 16), generator=torch.Generator().manual_seed(1))
    first_latents = small_vae.config.chunks(13)[0][1]
    assert torch.equal(small_vae.decode(z, 13)[:, :, :9], small_vae.decode(z[:, :, :first_latents], 9))


@torch.no_grad()
def test_encode_has_the_latent_size_and_is_seeded(small_vae):
    video = torch.rand(1, 3, 13, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean = small_vae.encode(video)
    assert mean.shape == (1, 4, *small_vae.latent_size(13, 16, 24))
    assert torch.equal(mean, small_vae.encode(video))
    draws = [small_vae.encode(video, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], mean)


@torch.no_grad()
def test_time_runs_forward_only(temporal):
    x = torch.randn(1, 4, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    later = x.clone()
    later[:, :, 8:] += 1
    # Group norms mix all frames, so causality is a fact about each convolution.
    convolution = temporal.encoder.conv_in
    assert torch.equal(convolution(x)[:, :, :8], convolution(later)[:, :, :8])
    assert not torch.equal(convolution(x)[:, :, 8:], convolution(later)[:, :, 8:])


@torch.no_grad()
def test_spatial_vae_is_diffusers_own(small_vae):
    """The same weights in diffusers' AutoencoderKL give the same numbers, at a size the reference data lacks."""
    autoencoder_kl = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl")
    config = small_vae.config.spatial
    theirs = autoencoder_kl.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
    ).eval()
    ours = small_vae.spatial_vae.module
    theirs.load_state_dict(ours.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(6)
    frames = torch.rand(2, 3, 20, 28, generator=generator) * 2 - 1
    posterior, expected = ours.encode(frames), theirs.encode(frames).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(posterior.logvar, expected.logvar, atol=1e-4, rtol=1e-4)
    z = torch.randn(2, 4, 5, 7, generator=generator)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-4, rtol=1e-4)


def test_wrong_sizes_are_refused(small_vae):
    z = torch.zeros(1, 4, 3, 4, 4)
    with pytest.raises(ValueError, match="27 frames have 9 latent frames, got 3"):
        small_vae.decode(z, 27)
    with pytest.raises(ValueError, match="at least one frame"):
        small_vae.latent_size(0, 16, 16)
    with pytest.raises(ValueError, match="one value for each of the 4 latent channels"):
        OpenSoraVAEConfig(shift=(0.0,))


def test_config_refuses_what_it_does_not_know():
    for config in ({"micro_frames": 3}, {"vae_2d": {"micro": 3}}, {"vae_temporal": {"config": {"filter": 3}}}):
        with pytest.raises(ValueError, match=r"unknown .* config keys: (micro_frames|micro|filter)"):
            OpenSoraVAEConfig.from_dict(config)
