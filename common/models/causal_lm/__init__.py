"""Causal language models over paged keys and values.

``load`` gives a ``CausalLM``; ``KVPool`` is the memory of its keys and values in blocks, ``BlockTable`` one sequence's
blocks, and ``CausalLM.forward`` computes ``Chunk`` after ``Chunk``: whole prompts, pieces of them and single tokens of
many sequences in one pass.
"""

from common.models.causal_lm.batch import Chunk
from common.models.causal_lm.errors import (
    CausalLMError,
    ModelLoadError,
    UnsupportedModelError,
    WrongChunkError,
    WrongSamplingError,
)
from common.models.causal_lm.loading import load, load_tokenizer, weights_digest
from common.models.causal_lm.model import CausalLM
from common.models.causal_lm.paging import BLOCK_TOKENS, BlockTable, KVLayout, KVPool

__all__ = [
    "BLOCK_TOKENS",
    "BlockTable",
    "CausalLM",
    "CausalLMError",
    "Chunk",
    "KVLayout",
    "KVPool",
    "ModelLoadError",
    "UnsupportedModelError",
    "WrongChunkError",
    "WrongSamplingError",
    "load",
    "load_tokenizer",
    "weights_digest",
]
