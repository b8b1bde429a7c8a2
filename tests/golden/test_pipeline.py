"""The phases as the services use them: together they make a video, apart they make the same one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.models.opensora.errors import ModelLoadError, PromptTooLongError
from common.models.opensora.pipeline import Denoiser, FrameDecoder, OpenSoraPipeline, PromptEncoder, to_pixels
from common.models.opensora.rectified_flow import RectifiedFlow
from common.models.opensora.text import TextEncoder

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


def settings(spec, **changes) -> dict:
    defaults = spec.defaults
    values = {"width": 32, "height": 32, "frames": 13, "fps": defaults.fps, "steps": 4, "seed": 3}
    return {**values, "guidance_scale": defaults.guidance_scale, **changes}


def test_three_processes_worth_of_phases_make_the_same_video(pipeline, spec):
    """Each phase loaded on its own; the denoiser replaced half way by a fresh one that has only the latent."""
    expected = pipeline.generate(PROMPT, seed=3, steps=4)
    text = PromptEncoder(spec, "cpu").encode([PROMPT])[0]
    first = Denoiser(spec, "cpu").start(text, None, **settings(spec))
    first.step()
    first.step()
    latent = torch.from_numpy(first.latent.numpy().copy())
    second = Denoiser(spec, "cpu").start(text, None, **settings(spec), latent=latent, steps_done=2)
    while not second.finished:
        second.step()
    assert second.steps_done == 4
    assert torch.equal(second.latent, expected.latent)
    chunks = list(FrameDecoder(spec, "cpu").decode(second.latent, 13, 32, 32))
    assert [chunk.shape[0] for chunk in chunks] == [9, 4]
    assert np.array_equal(np.concatenate(chunks), expected.frames)


def test_denoising_is_the_samplers_own_loop(pipeline, spec):
    """With text padded and the null caption masked as published, down to rounding."""
    denoiser = pipeline.denoiser
    text = pipeline.encoder._encoder.encode([PROMPT])
    latent = denoiser.initial_latent(4, 13, 32, 32)
    expected = pipeline.generate(PROMPT, seed=4, guidance_scale=3.0).latent
    prompts = torch.cat((text.embeddings, denoiser.model.null_embedding()))

    def model(z, t, prepared, frame_mask):
        return denoiser.model(z, t, prepared, fps=float(spec.defaults.fps), height=32, width=32)

    with torch.no_grad():
        prepared = denoiser.model.prepare_text(prompts, text.mask)
        flow = RectifiedFlow()
        whole = flow.sample(model, latent, flow.timesteps(3, 32, 32, 13), prepared, 3.0)
    torch.testing.assert_close(expected, whole, atol=1e-3, rtol=1e-3)


def test_prompts_of_unlike_length_are_masked(pipeline, spec):
    """A longer negative prompt must not lend its tokens to the shorter prompt."""
    short, long = pipeline.encoder.encode(["a circle", "a red blue circle square moves left right up down"])
    denoiser = pipeline.denoiser
    conditioning = denoiser.prepare(short, long, 13, 32, 32, 8)
    assert conditioning.text.mask.sum((1, 2, 3)).tolist() == [short.shape[0], long.shape[0]]
    alone = denoiser.prepare(short, None, 13, 32, 32, 8)
    latent = denoiser.initial_latent(1, 13, 32, 32)
    steps = [denoiser.step(latent, 0, (1000.0,), each, 1.0) for each in (conditioning, alone)]
    torch.testing.assert_close(*steps, atol=1e-4, rtol=1e-4)


def test_another_way_to_run_the_transformer(pipeline, spec):
    text = pipeline.encoder.encode([PROMPT])[0]
    denoiser = pipeline.denoiser
    calls = []

    def shared(*arguments, **named):
        calls.append(named["height"])
        return denoiser.model(*arguments, **named)

    alone, together = (denoiser.start(text, None, **settings(spec)) for _ in range(2))
    alone.step()
    together.step(shared)
    assert torch.equal(alone.latent, together.latent)
    assert calls == [32]


def test_prompts_are_encoded_the_same_in_any_company(pipeline):
    prompts = [PROMPT, "a  Blue SQUARE "]
    batch = pipeline.encoder.encode(prompts)
    assert [each.shape[0] for each in batch] == [pipeline.encoder.token_count(prompt) for prompt in prompts] == [6, 4]
    for prompt, encoded in zip(prompts, batch, strict=True):
        assert encoded.dtype == torch.float32
        assert torch.equal(encoded, pipeline.encoder.encode([prompt])[0])
    assert torch.equal(pipeline.encoder.encode(["A blue square"])[0], batch[1])


def test_padded_text_is_the_unpadded_under_a_mask(spec):
    encoder = TextEncoder(spec.text_encoder, 12, "cpu")
    prompts = [PROMPT, "a blue square"]
    padded = encoder.encode(prompts)
    assert padded.embeddings.shape == (2, 1, 12, 24)
    assert padded.mask.dtype == torch.int64
    for row, alone in enumerate(encoder.encode_each(prompts)):
        counted = padded.embeddings[row, 0][padded.mask[row] == 1]
        torch.testing.assert_close(counted, alone, atol=1e-5, rtol=1e-5)


def test_a_prompt_too_long_is_refused(pipeline):
    assert pipeline.encoder.token_count("a " * 11) == pipeline.encoder.max_tokens == 12
    pipeline.encoder.encode(["a " * 11])
    with pytest.raises(PromptTooLongError, match="has 13 tokens, the model reads at most 12") as caught:
        pipeline.encoder.encode(["a", "a " * 12])
    assert (caught.value.tokens, caught.value.limit) == (13, 12)


def test_what_does_not_fit_is_refused(pipeline, spec, tmp_path):
    with pytest.raises(ValueError, match="latent, got"):
        pipeline.decoder.decode(torch.zeros(1, 4, 2, 8, 8), 13, 32, 32)
    text = torch.zeros(3, 24)
    with pytest.raises(ValueError, match="after step 2 of 4 takes the latent"):
        pipeline.denoiser.start(text, None, **settings(spec), steps_done=2)
    with pytest.raises(ValueError, match="latent, got"):
        pipeline.denoiser.start(text, None, **settings(spec), latent=torch.zeros(1, 4, 2, 8, 8), steps_done=2)
    with pytest.raises(ValueError, match="has 13 tokens, the transformer reads at most 12"):
        pipeline.denoiser.start(torch.zeros(13, 24), None, **settings(spec))
    with pytest.raises(ModelLoadError, match="max_prompt_tokens is 99, the transformer reads at most 12"):
        Denoiser(replace(spec, max_prompt_tokens=99), "cpu")
    with pytest.raises(ModelLoadError, match="no readable T5 encoder"):
        PromptEncoder(replace(spec, text_encoder=str(tmp_path)), "cpu")


def test_a_size_the_autoencoder_rounds_down_comes_out_as_asked(pipeline):
    frames = pipeline.generate(PROMPT, seed=1, width=38, height=33).frames
    assert frames.shape == (13, 33, 38, 3)
    assert np.array_equal(frames[:, :, 0], frames[:, :, 1])
    assert not np.array_equal(frames[:, :, 1], frames[:, :, 2])


def test_pixels():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 5, 1, 1).expand(3, 5, 1, 1)
    assert to_pixels(values)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
