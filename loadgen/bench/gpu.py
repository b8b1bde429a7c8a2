"""Open-Sora 1.2 at its published size on one GPU: time, memory and share of the matrix rate, step and decoding.

Weights are random and nothing is fetched. For each size it measures one guided step and the decoding of one video, as
the models are and compiled. What the card could do at best is measured in the same run, by products of large matrices.
``--device cpu --tiny`` takes the same way in seconds; its figures say nothing.
"""

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.models.opensora.gpu.graphs import CapturedSTDiT3
from loadgen.bench.compare import keep_rows
from loadgen.gpu.measure import Failed, Reading, free_memory, measure
from loadgen.gpu.options import DTYPES, add_measuring_arguments, check_counts, chosen_device
from loadgen.gpu.rates import data_sheet_flops, matrix_flops
from loadgen.gpu.setups import (
    PUBLISHED,
    TINY,
    Decoding,
    GuidedStep,
    Setup,
    compile_transformer,
    compile_vae,
    decode_flops,
    random_transformer,
    random_vae,
)
from loadgen.gpu.table import Decode, Rates, Step, device_name, name_of
from loadgen.refusal import WrongArgument

_ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--size", nargs="+", metavar="NAME", help=f"of {', '.join(PUBLISHED.sizes)} (default: all)")
    add_measuring_arguments(parser)
    parser.add_argument("--attention", choices=("auto", *_ATTENTION), default="auto", help="torch's kernel to prefer")
    parser.add_argument("--not-compiled", action="store_true", help="leave the compiled half out")
    parser.add_argument("--compile-vae", action="store_true", help="compile the autoencoder too: minutes for each size")
    parser.add_argument("--backend", metavar="NAME", help="what compiles (default inductor; on a CPU aot_eager)")
    parser.add_argument("--tiny", action="store_true", help="a tiny likeness instead of the published size")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print line by line, keep what there is in ``--json`` after each, and return it."""
    bench = _Bench.of(options)
    torch.manual_seed(1)
    with _preferring(options.attention):
        rates = bench.begin()
        return keep_rows({"benchmark": "gpu", "environment": bench.environment(rates)}, bench.rows(rates), options.json)


@dataclass(frozen=True)
class _Bench:
    setup: Setup
    sizes: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    warm_up: int
    repeats: int
    attention: str
    backend: str | None
    compile_vae: bool

    @classmethod
    def of(cls, options: argparse.Namespace) -> "_Bench":
        """Raises WrongArgument."""
        setup = TINY if options.tiny else PUBLISHED
        check_counts(options)
        for size in options.size or ():
            if size not in setup.sizes:
                raise WrongArgument(f"--size {size}: give some of {', '.join(setup.sizes)}")
        device = chosen_device(options.device)
        # What inductor makes for a CPU takes minutes of a C++ compiler.
        backend = options.backend or ("aot_eager" if device.type == "cpu" else "inductor")
        if backend not in torch.compiler.list_backends(exclude_tags=()):
            raise WrongArgument(f"--backend {backend}: give one of {', '.join(torch.compiler.list_backends())}")
        return cls(
            setup=setup,
            sizes=tuple(dict.fromkeys(options.size or setup.sizes)),
            device=device,
            dtype=DTYPES[options.dtype],
            warm_up=options.warm_up,
            repeats=options.repeats,
            attention=options.attention,
            backend=None if options.not_compiled else backend,
            compile_vae=options.compile_vae,
        )

    def begin(self) -> Rates:
        """What the card can do at best."""
        card, dtype = device_name(self.device), name_of(self.dtype)
        print(f"{self.setup.name}, {dtype}, {self.attention} attention, on {card}, torch {torch.__version__}")
        rates = Rates(
            matrix_flops(self.device, self.dtype, self.warm_up, self.repeats),
            data_sheet_flops(card) if self.dtype is torch.bfloat16 else None,
        )
        print(rates.text(), flush=True)
        return rates

    def environment(self, rates: Rates) -> dict[str, object]:
        """For ``--json``."""
        return {
            "device": device_name(self.device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "dtype": name_of(self.dtype),
            "attention": self.attention,
            "backend": self.backend,
            "model": self.setup.name,
            "text_tokens": self.setup.text_tokens,
            "matrix_flops_per_s": vars(rates),
        }

    def rows(self, rates: Rates) -> Iterator[dict[str, object]]:
        """Every step and decoding as the models are, then compiled; the end where the device is lost."""
        parts: list[Iterator[Step | Decode]] = [self._steps(rates, None), self._decodes(rates, None)]
        if self.backend is not None and self.compile_vae:
            parts.append(self._decodes(rates, self.backend))
        if self.backend is not None:
            parts.append(self._steps(rates, self.backend))
        for row in itertools.chain.from_iterable(parts):
            yield row.as_dict()
            if isinstance(row.outcome, Failed) and row.outcome.device_lost:
                return

    def _steps(self, rates: Rates, backend: str | None) -> Iterator[Step]:
        print(f"\none guided step of {self.setup.frames} frames, {self.setup.text_tokens} text tokens\n{Step.HEAD}")
        model = random_transformer(self.setup, self.device, self.dtype)
        run: Callable[..., Tensor] = model
        if backend is not None:
            compile_transformer(model, backend)
        elif self.device.type == "cuda":
            # As a worker does.
            run = CapturedSTDiT3(model)
        for size, outcome in self._outcomes(
            lambda size: GuidedStep(self.setup, size, model, self.device, run), backend
        ):
            step = Step(self.setup, size, backend is not None, outcome, rates)
            print(step.line(), flush=True)
            yield step

    def _decodes(self, rates: Rates, backend: str | None) -> Iterator[Decode]:
        print(f"\none video decoded\n{Decode.HEAD}")
        vae = random_vae(self.setup, self.device, self.dtype)
        if backend is not None:
            compile_vae(vae, backend)
        for size, outcome in self._outcomes(lambda size: Decoding(self.setup, size, vae, self.device), backend):
            work = decode_flops(self.setup, size)
            decode = Decode(self.setup, size, backend is not None, outcome, rates, work)
            print(decode.line(), flush=True)
            yield decode

    def _outcomes(
        self, make: Callable[[str], Callable[[], object]], backend: str | None
    ) -> Iterator[tuple[str, Reading | Failed]]:
        """Of every size."""
        for size in self.sizes:
            free_memory(self.device)
            with contextlib.ExitStack() as stack:
                if backend is not None:
                    # For this size alone, with nothing kept of what was compiled before: what compiling costs is a
                    # figure too.
                    torch.compiler.reset()
                    stack.enter_context(fresh_cache())
                outcome = measure(make(size), self.device, self.warm_up, self.repeats)
            yield size, outcome
        # What was compiled holds on to weights, which would count as memory of what is measured next.
        torch.compiler.reset()


def _preferring(attention: str) -> contextlib.AbstractContextManager[object]:
    """That kernel wherever it fits, another elsewhere: none but the last two takes the heads of the autoencoder."""
    if attention == "auto":
        return contextlib.nullcontext()
    others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    chosen = _ATTENTION[attention]
    return sdpa_kernel([chosen, *(other for other in others if other is not chosen)], set_priority=True)
