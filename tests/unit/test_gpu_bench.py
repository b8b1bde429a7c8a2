"""What ``loadgen bench gpu`` counts and knows, and the whole of it at a tiny size on a CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.models.causal_lm import KVLayout
from common.models.opensora import STDiT3Config
from loadgen.__main__ import main
from loadgen.gpu.flops import step_flops
from loadgen.gpu.language import TINY as TINY_LANGUAGE
from loadgen.gpu.language import Work
from loadgen.gpu.measure import Failed, measure
from loadgen.gpu.rates import data_sheet_flops
from loadgen.gpu.setups import GUIDED_ROWS, PUBLISHED, TINY, GuidedStep, compile_transformer, random_transformer

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", TINY.sizes)
@pytest.mark.parametrize(("depth", "text_tokens"), [(2, 6), (1, 12)])
def test_the_formula_counts_what_torch_counts(size: str, depth: int, text_tokens: int) -> None:
    setup = replace(TINY, transformer=replace(TINY.transformer, depth=depth), text_tokens=text_tokens)
    step = GuidedStep(setup, size, random_transformer(setup, CPU, torch.float32), CPU)
    # Attention by matrix products, which the counter knows on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    frames, patches = setup.grid(size)
    counted = step_flops(setup.transformer, GUIDED_ROWS, frames, patches, text_tokens)
    assert counted.total == counter.get_total_flops()


def test_the_published_sizes_are_those_of_open_sora() -> None:
    grids = {size: PUBLISHED.grid(size) for size in PUBLISHED.sizes}
    assert grids == {"144p": (15, 144), "240p": (15, 405), "360p": (15, 920), "720p": (15, 3600)}
    assert PUBLISHED.transformer == STDiT3Config()
    assert PUBLISHED.latent_shape("240p") == (1, 4, 15, 30, 53)
    # 2 rows of 13,800 tokens through 1.2 billion weights: the linear layers are nearly all of it at 360p.
    flops = step_flops(PUBLISHED.transformer, 2, *PUBLISHED.grid("360p"), PUBLISHED.text_tokens)
    assert flops.total == pytest.approx(62.9e12, rel=0.01)
    assert flops.linear / flops.total == pytest.approx(0.913, abs=0.001)


def test_random_weights_keep_positions_in_float32_and_leave_no_matrix_zero() -> None:
    model = random_transformer(TINY, CPU, torch.bfloat16)
    assert model.rope.freqs.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert all(weight.any() for weight in model.parameters() if weight.dim() > 1)


def test_blocks_are_compiled_once_for_each_kind_and_compute_the_same() -> None:
    setup = replace(TINY, transformer=replace(TINY.transformer, depth=3))
    model = random_transformer(setup, CPU, torch.float32)
    step = GuidedStep(setup, "240p", model, CPU)
    expected = step()
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compile_transformer(model, keep)
    assert torch.equal(step(), expected)
    assert len(graphs) == 2
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("card", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_data_sheets(card: str, tera: float | None) -> None:
    assert data_sheet_flops(card) == (None if tera is None else tera * 1e12)


def test_too_little_memory_is_a_cell_not_the_end() -> None:
    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert measure(work, CPU, warm_up=0, repeats=1) == Failed("out of memory")


def test_the_same_way_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    few = ["--repeats", "2", "--warm-up", "0", "--size", "240p", "--backend", "eager", "--compile-vae"]
    assert main(["bench", "gpu", "--device", "cpu", "--tiny", *few, "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "tiny, bfloat16" in said and "by the data sheet not known" in said
    result = json.loads(out.read_text())
    rows = [(run["phase"], run["size"], run["compiled"]) for run in result["runs"]]
    ways = [("step", False), ("decode", False), ("decode", True), ("step", True)]
    assert rows == [(phase, "240p", compiled) for phase, compiled in ways]
    step, decode, *_ = result["runs"]
    assert step["tokens"] == 140 and step["share_of_matrix_rate"]["measured"] > 0
    assert decode["flops"] > 0 and decode["share_of_matrix_rate"]["measured"] > 0
    assert step["peak_bytes"] is None and len(decode["seconds"]) == 2
    torch.compiler.reset()


def test_a_language_models_work_is_that_of_its_weights() -> None:
    config = TINY_LANGUAGE.configs["tiny"]()
    model = transformers.LlamaForCausalLM(config)
    work = Work.of(config, KVLayout(2, 2, 16, torch.bfloat16))
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert work.head_weights == head.numel()
    matrices = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
    assert work.layer_weights == matrices - head.numel() - embedding.numel()
    # Two tokens: each through all layers, the second attending to both; the logits after the last alone.
    attention = 4 * 64 * 2 * (1 + 2)
    assert work.prompt_flops(2, 1) == 2 * (2 * work.layer_weights) + attention + 2 * work.head_weights
    assert work.step_bytes(3, 10) == 2 * (work.layer_weights + work.head_weights) + 3 * 10 * (2 * 2 * 2 * 16 * 2)


def test_language_models_the_same_way_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu-llm.json"
    few = ["--repeats", "2", "--warm-up", "0"]
    assert main(["bench", "gpu-llm", "--device", "cpu", "--tiny", *few, "--json", str(out)]) == 0
    assert "tiny: a prompt of 64 tokens" in capsys.readouterr().out
    prefills, decodes = [], []
    for run in json.loads(out.read_text())["runs"]:
        (prefills if run["phase"] == "prefill" else decodes).append(run)
    assert [run["chunk_tokens"] for run in prefills] == [16, 64]
    assert [run["sequences"] for run in decodes] == [1, 3] and not any(run["captured"] for run in decodes)
    assert all(run["share_of_matrix_rate"] > 0 for run in prefills)
    assert all(run["share_of_bandwidth"] > 0 for run in decodes)


def test_an_unknown_language_model_is_refused_in_one_line() -> None:
    with pytest.raises(SystemExit, match="loadgen bench gpu-llm: --model gpt: give some of tiny"):
        main(["bench", "gpu-llm", "--tiny", "--device", "cpu", "--model", "gpt"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--size", "12p"], "--size 12p: give some of 144p, 240p"),
        (["--repeats", "0"], "--repeats 0: give 1 or more"),
        (["--warm-up", "-1"], "--warm-up -1: give 0 or more"),
        (["--device", "tpu"], "--device tpu: give cuda, cuda:1, ... or cpu"),
        (["--backend", "gcc"], "--backend gcc: give one of"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments: list[str], problem: str) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["bench", "gpu", "--tiny", "--device", "cpu", *arguments])
    assert str(refused.value).startswith(f"loadgen bench gpu: {problem}")
    assert "\n" not in str(refused.value)
