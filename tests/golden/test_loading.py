"""Checkpoints: written and read back to the bit, and refused with the reason when they do not fit."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.models.opensora.errors import ModelLoadError
from common.models.opensora.loading import load_stdit3, load_vae, save_stdit3, save_vae
from common.models.opensora.spec import OPEN_SORA_1_2, VideoModelSpec, load_spec, save_spec


@pytest.fixture
def folder(tmp_path: Path, small_stdit3) -> Path:
    save_stdit3(small_stdit3, tmp_path / "transformer")
    return tmp_path / "transformer"


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def same_state(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_stdit3_comes_back_to_the_bit(folder, small_stdit3):
    loaded = load_stdit3(folder, "cpu")
    assert loaded.config == small_stdit3.config
    assert not loaded.training
    assert not loaded.rope.freqs.requires_grad
    same_state(loaded, small_stdit3)


def test_vae_comes_back_to_the_bit(tmp_path, small_vae):
    save_vae(small_vae, tmp_path)
    loaded = load_vae(tmp_path, "cpu")
    assert loaded.config == small_vae.config
    same_state(loaded, small_vae)


def test_half_precision_on_disk_is_cast(tmp_path, small_stdit3):
    save_stdit3(small_stdit3, tmp_path, torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["x_embedder.proj.weight"].dtype == torch.float16
    loaded = load_stdit3(tmp_path, "cpu")
    for name, value in loaded.state_dict().items():
        expected = small_stdit3.state_dict()[name]
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, atol=1e-3, rtol=1e-3)
    # Positions must not move because weights were rounded.
    assert torch.equal(loaded.rope.freqs, small_stdit3.rope.freqs)
    assert load_stdit3(tmp_path, "cpu", torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_a_vae_in_half_precision_decodes_nearly_the_same(tmp_path, small_vae):
    save_vae(small_vae, tmp_path, torch.float16)
    loaded = load_vae(tmp_path, "cpu", torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.scale, small_vae.scale)
    z = torch.randn(1, 4, *small_vae.latent_size(9, 16, 16), generator=torch.Generator().manual_seed(1))
    expected = small_vae.decode(z, 9)
    assert (loaded.decode(z, 9) - expected).abs().mean() < 0.1 * expected.std()


def test_weights_in_several_files(folder, small_stdit3):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    same_state(load_stdit3(folder, "cpu"), small_stdit3)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"weights are missing: .*b\.safetensors"):
        load_stdit3(folder, "cpu")
    index.write_text("{}")
    with pytest.raises(ModelLoadError, match="no readable weight_map"):
        load_stdit3(folder, "cpu")


def test_a_missing_key_is_named(folder):
    rewrite(folder, lambda weights: weights.pop("t_block.1.bias"))
    with pytest.raises(ModelLoadError, match=r"1 missing keys: t_block\.1\.bias"):
        load_stdit3(folder, "cpu")


def test_an_extra_key_is_named(folder):
    rewrite(folder, lambda weights: weights.update(surplus=torch.zeros(1)))
    with pytest.raises(ModelLoadError, match="1 unexpected keys: surplus"):
        load_stdit3(folder, "cpu")


def test_a_renamed_key_is_named_both_ways(folder):
    rewrite(folder, lambda weights: weights.update(time_block=weights.pop("t_block.1.bias")))
    with pytest.raises(ModelLoadError, match=r"missing keys: t_block\.1\.bias; 1 unexpected keys: time_block"):
        load_stdit3(folder, "cpu")


def test_a_wrong_shape_is_named(folder):
    rewrite(folder, lambda weights: weights.update({"t_block.1.bias": torch.zeros(3)}))
    with pytest.raises(ModelLoadError, match=r"t_block\.1\.bias is \[3\], the configuration makes it \[288\]"):
        load_stdit3(folder, "cpu")


def test_many_wrong_keys_stay_readable(folder):
    rewrite(folder, lambda weights: weights.update({f"extra.{i}": torch.zeros(1) for i in range(100)}))
    with pytest.raises(ModelLoadError, match=r"100 unexpected keys: .* and 92 more") as caught:
        load_stdit3(folder, "cpu")
    assert len(str(caught.value)) < 500


def test_files_that_are_not_there_or_damaged(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match="not a readable safetensors file"):
        load_stdit3(folder, "cpu")
    weights.unlink()
    with pytest.raises(ModelLoadError, match=r"weights are missing: .*model\.safetensors"):
        load_stdit3(folder, "cpu")
    config = folder / "config.json"
    config.write_text('{"hidden": 4}')
    with pytest.raises(ModelLoadError, match="unknown STDiT3 config keys: hidden"):
        load_stdit3(folder, "cpu")
    config.write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_stdit3(folder, "cpu")
    config.unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        load_stdit3(folder, "cpu")
    with pytest.raises(ModelLoadError, match="no such folder"):
        load_stdit3(folder / "nowhere", "cpu")


def test_another_architecture_is_refused(tmp_path, small_vae):
    save_vae(small_vae, tmp_path)
    with pytest.raises(ModelLoadError, match="unknown STDiT3 config keys"):
        load_stdit3(tmp_path, "cpu")


def test_spec_comes_back_with_its_folders(tmp_path, model_folder, spec):
    assert Path(spec.vae) == model_folder.resolve() / "vae"
    assert spec.sizes == ((32, 32), (48, 32))
    save_spec(replace(spec, transformer="someone/elsewhere"), tmp_path)
    again = load_spec(tmp_path)
    assert again.transformer == "someone/elsewhere"
    assert replace(again, transformer=spec.transformer) == spec


def test_the_published_model_has_a_spec_without_a_folder():
    spec = load_spec("hpcai-tech/OpenSora-STDiT-v3")
    assert spec is OPEN_SORA_1_2
    assert VideoModelSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown keys: colour"),
        ({"frames": [7]}, "default frames 13 is not one of frames"),
        ({"sizes": [[1]]}, "not enough values"),
        ({"family": "other"}, "family is 'other'"),
        ({"flow": {"speed": 2}}, "speed"),
        ({"steps_range": [10, 20]}, "default steps is outside steps_range"),
    ],
    ids=str,
)
def test_a_wrong_spec_says_what_is_wrong(tmp_path, spec, change, message):
    (tmp_path / "model_index.json").write_text(json.dumps({**spec.to_dict(), **change}))
    with pytest.raises(ModelLoadError, match=message):
        load_spec(tmp_path)


def test_a_spec_that_is_not_there_or_incomplete(tmp_path, spec):
    with pytest.raises(ModelLoadError, match=r"no model_index\.json there.*hpcai-tech/OpenSora-STDiT-v3"):
        load_spec(tmp_path)
    content = spec.to_dict()
    del content["frames"]
    (tmp_path / "model_index.json").write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match="key 'frames' is missing"):
        load_spec(tmp_path)


def test_reading_a_spec_does_not_load_torch(model_folder):
    code = (
        "import sys; from common.models.opensora.spec import load_spec; "
        f"load_spec({str(model_folder)!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"
