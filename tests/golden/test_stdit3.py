"""STDiT3 against the published code: outputs, inner values, and what must not depend on how it is called."""

import pytest
import torch
from torch import Tensor

from common.models.opensora import STDiT3, STDiT3Config
from tests.golden.support import cases, golden, inputs, tensors

REFERENCE = golden("stdit3")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
