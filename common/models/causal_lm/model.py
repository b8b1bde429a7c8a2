"""A causal language model over paged keys and values: packed chunks of many sequences in, their next logits out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.models.causal_lm import interface, probe
from common.models.causal_lm.batch import Batch, Chunk, pack
from common.models.causal_lm.fused import FusedDecoder, can_fuse
from common.models.causal_lm.gpu.decoder import GpuDecoder, can_decode
from common.models.causal_lm.gpu.graphs import DecodeGraphs
from common.models.causal_lm.gpu.kernels import gpu_kernels
from common.models.causal_lm.native import Kernels, kernels
from common.models.causal_lm.packed import PackedDecoder, can_pack
from common.models.causal_lm.paging import KVLayout, KVPool


class CausalLM:
    """Any transformers causal LM whose attention goes through the library's attention interface.

    The close relatives of Llama run through ``FusedDecoder`` on a CPU and ``GpuDecoder`` on a GPU, there with captured
    decoding steps; all others through transformers' own modules.

    Args:
        model: is taken over: its attention, and where it is fused its weights, belong to this object from now on.
        fuse: False: transformers' modules in any case.
        native: False: torch's own kernels in any case (on a CPU).

    Attributes:
        capture: whether decoding steps are captured as CUDA graphs (on a GPU, where the decoder is ours).
        layout: of its keys and values.
        context: how many positions it knows.
        vocabulary: how many tokens it knows.
        end_tokens: those that end an answer.

    Raises:
        UnsupportedModelError: the architecture does not fit; the message names the remedy.
    """

    def __init__(self, model: PreTrainedModel, fuse: bool = True, native: bool = True) -> None:
        model.eval().requires_grad_(False)
        config = model.config.get_text_config()
        self.layout: KVLayout = probe.layout_of(model)
        self.context: int = probe.context_of(model)
        self.vocabulary: int = config.vocab_size
        self.end_tokens: frozenset[int] = _end_tokens(model)
        self.device: torch.device = model.device
        on_cpu = self.device.type == "cpu"
        self._kernels: Kernels | None = kernels(self.layout.dtype) if native and on_cpu else None
        self._run: Callable[[Batch], Tensor]
        self._graphs: DecodeGraphs | None = None
        with torch.inference_mode():
            self._run = self._chosen(model) if fuse else _Interfaced(model)
        self.capture = True
        if isinstance(self._run, GpuDecoder):
            self._graphs = DecodeGraphs(self._run, self.context, self.device)

    def _chosen(self, model: PreTrainedModel) -> "Callable[[Batch], Tensor]":
        """The fastest that this model and this machine can have."""
        on_gpu = gpu_kernels() if self.device.type == "cuda" else None
        if on_gpu is not None and can_decode(model):
            return GpuDecoder(model, on_gpu)
        if not can_fuse(model):
            return _Interfaced(model)
        packing = self._kernels.decoder if self._kernels is not None else None
        if packing is not None and can_pack(model, packing):
            return PackedDecoder(model, packing, self.context)
        return FusedDecoder(model, self._kernels)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], pool: KVPool, stored: Callable[[int], None] | None = None) -> Tensor:
        """One pass over all chunks; their keys and values are in the pool afterwards.

        Args:
            stored: told each layer whose keys and values are in the pool (on a GPU: that will be, for what is queued
                behind), while the layer is still computed. Of captured steps nothing is told.

        Returns:
            [wanted, vocabulary] float32: the logits after the last token of each chunk that wants them, in order.

        Raises:
            WrongChunkError: a chunk that does not fit.
        """
        if stored is None and self.capture and self._graphs is not None and self._graphs.fit(chunks):
            # Another's next pass fills the same memory.
            return self._graphs(chunks, pool).to(torch.float32, copy=True)
        return self._run(pack(chunks, pool, self.context, self.device, self._kernels, stored)).float()


class _Interfaced:
    """transformers' own forward pass, its attention replaced."""

    def __init__(self, model: PreTrainedModel) -> None:
        interface.use(model)
        self._model = model

    def __call__(self, batch: Batch) -> Tensor:
        out = self._model(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=0 if batch.wanted is None else batch.wanted,
            paged=batch,
        )
        logits: Tensor = out.logits[0]
        return logits


def _end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """From the generation configuration (where chat models name all of theirs), else from the model's own."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    if named is None:
        named = model.config.get_text_config().eos_token_id
    if named is None:
        return frozenset()
    return frozenset(named) if isinstance(named, list | tuple) else frozenset({int(named)})
