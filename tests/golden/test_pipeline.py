"""The phases as the services use them: together they make a video, apart they make the same one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.models.opensora.errors import ModelLoadError, PromptTooLongError
from common.models.opensora.pipeline import Denoiser, FrameDecoder, OpenSoraPipeline, PromptEncoder, to_pixels
from common.models.opensora.rectified_flow import RectifiedFlow

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def pipeline(spec) -> OpenSoraPipeline:
    return OpenSoraPipeline(spec)


def test_a_seed_means_a_video(pipeline):
    first, again, other = (pipeline.generate(PROMPT, seed=seed) for seed in (1, 1, 2))
    assert first.frames.shape == (13, 32, 32, 3)
    assert first.frames.dtype == np.uint8
    assert torch.equal(first.latent, again.latent)
    assert np.array_equal(first.frames, again.frames)
    assert not np.array_equal(first.frames, other.frames)


def test_every_choice_shows(pipeline):
    base = pipeline.generate(PROMPT, seed=1).latent
    for changed in (
        pipeline.generate("a blue square moves up", seed=1),
        pipeline.generate(PROMPT, seed=1, negative_prompt="a blue square"),
        pipeline.generate(PROMPT, seed=1, guidance_scale=5.0),
        pipeline.generate(PROMPT, seed=1, steps=4),
        pipeline.generate(PROMPT, seed=1, fps=24),
    ):
        assert changed.latent.shape == base.shape
        assert not torch.allclose(changed.latent, base)
    assert pipeline.generate(PROMPT, seed=1, width=48).frames.shape == (13, 32, 48, 3)
    assert pipeline.generate(PROMPT, seed=1, frames=1).frames.shape == (1, 32, 32, 3)


def test_three_processes_worth_of_phases_make_the_same_video(pipeline, spec):
    """Each phase loaded on its own; the denoiser replaced half way by a fresh one that has only the latent."""
    expected = pipeline.generate(PROMPT, seed=3, steps=4)
    text = PromptEncoder(spec, "cpu").encode([PROMPT])
    latent = Denoiser(spec, "cpu").initial_latent(3, 13, 32, 32)
    for first, last in ((0, 2), (2, 4)):
        worker = Denoiser(spec, "cpu")
        timesteps = worker.timesteps(4, 13, 32, 32)
        conditioning = worker.prepare(text, None, 13, 32, 32, spec.defaults.fps)
        latent = torch.from_numpy(latent.numpy().copy())
        for index in range(first, last):
            latent = worker.step(latent, index, timesteps, conditioning, spec.defaults.guidance_scale)
    assert torch.equal(latent, expected.latent)
    chunks = list(FrameDecoder(spec, "cpu").decode(latent, 13, 32, 32))
    assert [chunk.shape[0] for chunk in chunks] == [9, 4]
    assert np.array_equal(np.concatenate(chunks), expected.frames)


def test_denoising_is_the_samplers_own_loop(pipeline, spec):
    denoiser = pipeline.denoiser
    text = pipeline.encoder.encode([PROMPT])
    latent = denoiser.initial_latent(4, 13, 32, 32)
    expected = pipeline.generate(PROMPT, seed=4, guidance_scale=3.0).latent
    prompts = torch.cat((text.embeddings, denoiser.model.null_embedding()))

    def model(z, t, prepared, frame_mask):
        return denoiser.model(z, t, prepared, fps=float(spec.defaults.fps), height=32, width=32)

    with torch.no_grad():
        prepared = denoiser.model.prepare_text(prompts, text.mask)
        flow = RectifiedFlow()
        whole = flow.sample(model, latent, flow.timesteps(3, 32, 32, 13), prepared, 3.0)
    assert torch.equal(whole, expected)


def test_another_way_to_run_the_transformer(pipeline):
    text = pipeline.encoder.encode([PROMPT])
    denoiser = pipeline.denoiser
    conditioning = denoiser.prepare(text, None, 13, 32, 32, 8)
    latent = denoiser.initial_latent(5, 13, 32, 32)
    calls = []

    def shared(*arguments, **named):
        calls.append(named["height"])
        return denoiser.model(*arguments, **named)

    direct = denoiser.step(latent, 0, (1000.0, 500.0), conditioning, 2.0)
    assert torch.equal(denoiser.step(latent, 0, (1000.0, 500.0), conditioning, 2.0, shared), direct)
    assert calls == [32]


def test_text_embeddings(pipeline):
    prompts = [PROMPT, "a  Blue SQUARE "]
    batch = pipeline.encoder.encode(prompts)
    assert batch.embeddings.shape == (2, 1, 12, 24)
    assert batch.embeddings.dtype == torch.float32
    assert batch.mask.dtype == torch.int64
    assert batch.mask.sum(1).tolist() == [pipeline.encoder.token_count(prompt) for prompt in prompts] == [6, 4]
    for index, prompt in enumerate(prompts):
        alone = pipeline.encoder.encode([prompt])
        torch.testing.assert_close(batch.row(index).embeddings, alone.embeddings, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        pipeline.encoder.encode(["A blue square"]).embeddings, pipeline.encoder.encode([prompts[1]]).embeddings
    )


def test_a_prompt_too_long_is_refused(pipeline):
    assert pipeline.encoder.token_count("a " * 11) == 12
    pipeline.encoder.encode(["a " * 11])
    with pytest.raises(PromptTooLongError, match="has 13 tokens, the model reads at most 12") as caught:
        pipeline.encoder.encode(["a", "a " * 12])
    assert (caught.value.tokens, caught.value.limit) == (13, 12)


def test_what_does_not_fit_is_refused(pipeline, spec, tmp_path):
    with pytest.raises(ValueError, match="latent, got"):
        pipeline.decoder.decode(torch.zeros(1, 4, 2, 8, 8), 13, 32, 32)
    with pytest.raises(ModelLoadError, match="max_prompt_tokens is 99, the transformer reads at most 12"):
        Denoiser(replace(spec, max_prompt_tokens=99), "cpu")
    with pytest.raises(ModelLoadError, match="no readable T5 encoder"):
        PromptEncoder(replace(spec, text_encoder=str(tmp_path)), "cpu")


def test_pixels():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 5, 1, 1).expand(3, 5, 1, 1)
    assert to_pixels(values)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
