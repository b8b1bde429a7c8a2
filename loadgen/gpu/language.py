"""Language models that are measured, with random weights made on the device: their work in operations and bytes.

Two limits say how fast a model can be. Computing a prompt is bound by operations: each of its tokens passes every
weight of the layers once, a multiplication with its addition counting as two, and attends to all tokens before it.
Decoding is bound by bytes: a step reads every weight once for all sequences, and each sequence's keys and values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from common.models.causal_lm import BLOCK_TOKENS, BlockTable, CausalLM, Chunk, KVLayout, KVPool


@dataclass(frozen=True)
class LanguageSetup:
    """chunks: how many tokens of a prompt are computed at once; batches: how many sequences decode together."""

    configs: Mapping[str, Callable[[], PreTrainedConfig]]
    prompt: int
    chunks: tuple[int, ...]
    context: int
    batches: tuple[int, ...]


def _llama_7b() -> PreTrainedConfig:
    """Llama 2 of 7 billion: every head has keys of its own, half a megabyte a token."""
    return LlamaConfig(vocab_size=32000, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2)


def _qwen2_7b() -> PreTrainedConfig:
    """Qwen 2 of 7 billion: seven heads share each key, 56 KiB a token."""
    return Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
    )


def _tiny() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


PUBLISHED = LanguageSetup(
    configs={"llama-7b": _llama_7b, "qwen2-7b": _qwen2_7b},
    prompt=4096,
    chunks=(128, 256, 512, 1024, 2048, 4096),
    context=1024,
    batches=(1, 16, 64),
)
TINY = LanguageSetup({"tiny": _tiny}, prompt=64, chunks=(16, 64), context=32, batches=(1, 3))


def random_language_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """Weights are drawn on the device: main memory need not hold them."""
    with torch.device(device):
        return CausalLM(AutoModelForCausalLM.from_config(config, dtype=dtype))


@dataclass(frozen=True)
class Work:
    """What a model's passes cost.

    Attributes:
        layer_weights: of all layers' matrices.
        head_weights: of the matrix from the last layer to the vocabulary.
        attention_width: all heads of a layer together.
    """

    layer_weights: int
    head_weights: int
    attention_width: int
    layers: int
    layout: KVLayout

    @classmethod
    def of(cls, config: PreTrainedConfig, layout: KVLayout) -> "Work":
        hidden, width = config.hidden_size, config.num_attention_heads * layout.head_dim
        keys_values = 2 * layout.kv_heads * layout.head_dim
        layer = hidden * (2 * width + keys_values) + 3 * hidden * config.intermediate_size
        return cls(layout.layers * layer, hidden * config.vocab_size, width, layout.layers, layout)

    def prompt_flops(self, tokens: int, passes: int) -> int:
        """Operations of a prompt's passes: each ends with the logits after its last token."""
        attended = tokens * (tokens + 1) // 2
        attention = 4 * self.attention_width * self.layers * attended
        return 2 * self.layer_weights * tokens + attention + 2 * self.head_weights * passes

    def step_bytes(self, sequences: int, context: int) -> int:
        """Read by one decoding step of so many sequences, of `context` tokens each, the new one included."""
        weights = (self.layer_weights + self.head_weights) * self.layout.dtype.itemsize
        return weights + sequences * context * self.layout.token_bytes


class Prefill:
    """One prompt, chunk by chunk, as an instance computes a long one."""

    def __init__(self, model: CausalLM, prompt: int, chunk: int, device: torch.device) -> None:
        self._model, self._chunk = model, chunk
        self._tokens = torch.randint(model.vocabulary, (prompt,)).tolist()
        blocks = -(-prompt // BLOCK_TOKENS)
        self._table, self._pool = BlockTable(range(blocks)), KVPool(model.layout, blocks, device)

    def __call__(self) -> Tensor:
        logits = torch.empty(0)
        for start in range(0, len(self._tokens), self._chunk):
            chunk = Chunk("prompt", self._tokens[start : start + self._chunk], start, self._table)
            logits = self._model.forward([chunk], self._pool)
        return logits


@dataclass
class Decoding:
    """One step of sequences that all have `context` tokens, the new one included: to the chosen tokens on the host."""

    model: CausalLM
    sequences: int
    context: int
    device: torch.device
    _chunks: list[Chunk] = field(init=False)

    def __post_init__(self) -> None:
        blocks = -(-self.context // BLOCK_TOKENS)
        self._pool = KVPool(self.model.layout, self.sequences * blocks, self.device)
        self._pool.blocks.normal_()
        tables = [BlockTable(range(one * blocks, (one + 1) * blocks)) for one in range(self.sequences)]
        tokens = torch.randint(self.model.vocabulary, (self.sequences,)).tolist()
        self._chunks = [
            Chunk(str(one), (token,), self.context - 1, table)
            for one, (token, table) in enumerate(zip(tokens, tables, strict=True))
        ]

    def __call__(self) -> list[int]:
        chosen: list[int] = self.model.forward(self._chunks, self._pool).argmax(-1).tolist()
        return chosen
