"""STDiT3 against the published code: outputs, inner values, and what must not depend on how it is called."""

import pytest
import torch
from torch import Tensor

from common.models.opensora import STDiT3, STDiT3Config
from tests.golden.support import cases, golden, inputs, tensors

REFERENCE = golden("stdit3")


@pytest.fixture(scope="module")
def model() -> STDiT3:
    model = STDiT3(STDiT3Config.from_dict(REFERENCE["config"])).eval()
    model.load_state_dict(tensors("stdit3", "weights.safetensors"), strict=True)
    return model


def call(model: STDiT3, arguments: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**arguments)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **REFERENCE["suggested_tolerance"])


def test_key_names_and_shapes_are_the_published_ones(model):
    ours = [[name, list(value.shape)] for name, value in model.state_dict().items()]
    assert ours == REFERENCE["state_dict"]


@pytest.mark.parametrize("name", cases("stdit3"))
def test_output(model, name):
    arrays = tensors("stdit3", f"case_{name}.safetensors")
    out = call(model, inputs(arrays))
    assert out.dtype == torch.float32
    close(out, arrays["out"])


@pytest.mark.parametrize("case", [c for c in REFERENCE["cases"] if c["mid"]], ids=lambda c: c["name"])
def test_inner_values(model, case):
    arrays = tensors("stdit3", case["file"])
    seen: dict[str, Tensor] = {}
    hooks = []

    def keep_first(name: str):
        def hook(_module, _arguments, output):
            seen.setdefault(name, output)

        return hook

    for name in case["mid"]:
        module = model.get_submodule("pos_embed" if name == "pos_emb" else name)
        hooks.append(module.register_forward_hook(keep_first(name)))
    try:
        call(model, inputs(arrays))
    finally:
        for hook in hooks:
            hook.remove()
    assert sorted(seen) == case["mid"]
    for name in case["mid"]:
        close(seen[name], arrays[f"mid.{name}"])


@pytest.mark.parametrize("name", cases("stdit3"))
def test_prepared_text_gives_the_same_bits(model, name):
    arguments = inputs(tensors("stdit3", f"case_{name}.safetensors"))
    direct = call(model, arguments)
    with torch.no_grad():
        text = model.prepare_text(arguments.pop("y"), arguments.pop("mask", None))
    assert torch.equal(call(model, {**arguments, "y": text}), direct)


def random_call(model: STDiT3, batch: int, size: tuple[int, int, int], seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    lengths = torch.randint(1, config.model_max_length + 1, (batch, 1), generator=generator)
    return {
        "x": torch.randn(batch, config.in_channels, *size, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "y": torch.randn(batch, 1, config.model_max_length, config.caption_channels, generator=generator),
        "mask": (torch.arange(config.model_max_length) < lengths).long(),
        "fps": 24.0,
        "height": 8.0 * size[1],
        "width": 8.0 * size[2],
    }


SIZES = pytest.mark.parametrize("size", [(1, 4, 4), (5, 8, 6), (3, 5, 9)], ids=str)


@SIZES
def test_rows_of_a_batch_do_not_see_each_other(small_stdit3, size):
    arguments = random_call(small_stdit3, 3, size, seed=5)
    together = call(small_stdit3, arguments)
    for row in range(3):
        alone = {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in arguments.items()}
        close(together[row : row + 1], call(small_stdit3, alone))


@SIZES
def test_masked_text_has_no_influence(small_stdit3, size):
    arguments = random_call(small_stdit3, 2, size, seed=6)
    arguments["mask"][:, -2:] = 0
    other = {**arguments, "y": arguments["y"].clone()}
    other["y"][arguments["mask"][:, None] == 0] = 1e3
    close(call(small_stdit3, arguments), call(small_stdit3, other))
    unmasked = {**arguments, "mask": torch.ones_like(arguments["mask"])}
    assert not torch.allclose(call(small_stdit3, arguments), call(small_stdit3, unmasked), atol=1e-3)


def test_training_mode_keeps_unused_text_and_gives_the_same(small_stdit3):
    arguments = random_call(small_stdit3, 2, (2, 4, 4), seed=7)
    evaluated = call(small_stdit3, arguments)
    try:
        small_stdit3.train()
        text = small_stdit3.prepare_text(arguments["y"], arguments["mask"])
        trained = call(small_stdit3, arguments)
    finally:
        small_stdit3.eval()
    assert text.keys_values[0][0].shape[2] == small_stdit3.config.model_max_length
    close(trained, evaluated)


def test_a_prompt_without_tokens_adds_only_the_projection_bias(small_stdit3):
    arguments = random_call(small_stdit3, 1, (2, 4, 4), seed=8)
    arguments["mask"][:] = 0
    other = {**arguments, "y": arguments["y"] + 1}
    out = call(small_stdit3, arguments)
    assert out.isfinite().all()
    assert torch.equal(out, call(small_stdit3, other))


def test_frames_all_denoised_is_the_same_as_no_frame_mask(small_stdit3):
    arguments = random_call(small_stdit3, 2, (3, 4, 4), seed=9)
    masked = call(small_stdit3, {**arguments, "x_mask": torch.ones(2, 3, dtype=torch.bool)})
    close(masked, call(small_stdit3, arguments))


def test_sizes_may_be_tensors_or_numbers(small_stdit3):
    arguments = random_call(small_stdit3, 2, (2, 4, 4), seed=10)
    as_tensors = {k: torch.full((2,), v) if isinstance(v, float) else v for k, v in arguments.items()}
    close(call(small_stdit3, arguments), call(small_stdit3, as_tensors))


def test_every_weight_learns(small_stdit3):
    model = STDiT3(small_stdit3.config)
    model.load_state_dict(small_stdit3.state_dict())
    model(**random_call(model, 2, (2, 4, 4), seed=11)).square().mean().backward()
    silent = [name for name, value in model.named_parameters() if value.requires_grad and not value.grad.any()]
    assert silent == []


def test_tables_made_in_inference_mode_serve_training_too(small_stdit3):
    model = STDiT3(small_stdit3.config)
    arguments = random_call(model, 1, (2, 4, 4), seed=12)
    with torch.inference_mode():
        model.eval()(**arguments)
    model.train()(**arguments).sum().backward()
    assert model.final_layer.linear.bias.grad.any()


def test_a_fresh_model_predicts_zero_and_is_seeded(small_stdit3):
    first, second = STDiT3(small_stdit3.config), STDiT3(small_stdit3.config)
    for model in (first, second):
        model.initialize_weights(torch.Generator().manual_seed(13))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not call(first.eval(), random_call(first, 1, (2, 4, 4), seed=14)).any()


@pytest.mark.parametrize("missing", ["fps", "height", "width"])
def test_a_size_left_out_is_refused(small_stdit3, missing):
    arguments = random_call(small_stdit3, 1, (2, 4, 4), seed=15)
    del arguments[missing]
    with pytest.raises(ValueError, match="needs fps, height and width"):
        small_stdit3(**arguments)


def test_text_that_does_not_fit_is_refused(small_stdit3):
    arguments = random_call(small_stdit3, 2, (2, 4, 4), seed=16)
    with pytest.raises(ValueError, match="does not fit"):
        small_stdit3(**{**arguments, "mask": arguments["mask"][:, 1:]})
    text = small_stdit3.prepare_text(arguments["y"], arguments["mask"])
    with pytest.raises(ValueError, match="2 latents but 1 prompts"):
        small_stdit3(**{**arguments, "y": text.rows(0, 1)})


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown STDiT3 config keys: hiden_size"):
        STDiT3Config.from_dict({"hiden_size": 3})
    config = STDiT3Config.from_dict({**REFERENCE["config"], "enable_flash_attn": True})
    assert STDiT3Config.from_dict(config.to_dict()) == config
