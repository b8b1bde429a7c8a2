"""Language models of 7 billion weights on one GPU: prompts by chunk size, decoding by batch, held to the limits.

Weights are random and nothing is fetched. A prompt's passes are held against the card's matrix rate, a decoding step
against its memory bandwidth, both measured in the same run. ``--device cpu --tiny`` takes the same way in seconds; its
figures say nothing.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from common.models.causal_lm import CausalLM
from loadgen.bench.compare import keep_rows
from loadgen.gpu.language import PUBLISHED, TINY, Decoding, LanguageSetup, Prefill, Work, random_language_model
from loadgen.gpu.measure import Failed, Reading, free_memory, measure
from loadgen.gpu.options import DTYPES, add_measuring_arguments, check_counts, chosen_device
from loadgen.gpu.rates import copy_bytes, matrix_flops
from loadgen.gpu.table import device_name, duration, memory, name_of
from loadgen.refusal import WrongArgument

_PREFILL_HEAD = f"{'chunk':>6} {'passes':>6} {'prompt':>10} {'tokens/s':>9} {'TFLOP/s':>8} {'of rate':>8} {'peak':>10}"
_DECODE_HEAD = (
    f"{'sequences':>9} {'way':>9} {'step':>10} {'tokens/s':>9} {'GB':>6} {'GB/s':>6} {'of rate':>8} {'peak':>10}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--model", nargs="+", metavar="NAME", help=f"of {', '.join(PUBLISHED.configs)} (default: all)")
    add_measuring_arguments(parser)
    parser.add_argument("--tiny", action="store_true", help="a tiny likeness instead of the published sizes")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print line by line, keep what there is in ``--json`` after each, and return it."""
    bench = _Bench.of(options)
    torch.manual_seed(1)
    begun = bench.begin()
    return keep_rows({"benchmark": "gpu-llm", "environment": begun}, bench.rows(begun), options.json)


@dataclass(frozen=True)
class _Bench:
    setup: LanguageSetup
    models: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    warm_up: int
    repeats: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> "_Bench":
        """Raises WrongArgument."""
        setup = TINY if options.tiny else PUBLISHED
        check_counts(options)
        for model in options.model or ():
            if model not in setup.configs:
                raise WrongArgument(f"--model {model}: give some of {', '.join(setup.configs)}")
        return cls(
            setup,
            tuple(dict.fromkeys(options.model or setup.configs)),
            chosen_device(options.device),
            DTYPES[options.dtype],
            options.warm_up,
            options.repeats,
        )

    def begin(self) -> dict[str, Any]:
        """What the rows are held against."""
        card, dtype = device_name(self.device), name_of(self.dtype)
        flops = matrix_flops(self.device, self.dtype, self.warm_up, self.repeats)
        bandwidth = copy_bytes(self.device, self.warm_up, self.repeats)
        print(f"{', '.join(self.models)}, {dtype}, on {card}, torch {torch.__version__}")
        print(f"matrix rate {flops / 1e12:.3g} TFLOP/s, bandwidth of a copy, both ways, {bandwidth / 1e12:.3g} TB/s")
        environment = {"device": card, "torch": torch.__version__, "cuda": torch.version.cuda, "dtype": dtype}
        return {**environment, "matrix_flops_per_s": flops, "copy_bytes_per_s": bandwidth}

    def rows(self, rates: dict[str, Any]) -> Iterator[dict[str, object]]:
        """Every reading of every model."""
        for name in self.models:
            config = self.setup.configs[name]()
            model = random_language_model(config, self.device, self.dtype)
            work = Work.of(config, model.layout)
            print(f"\n{name}: a prompt of {self.setup.prompt} tokens\n{_PREFILL_HEAD}", flush=True)
            for row in self._prefills(model, work, rates["matrix_flops_per_s"]):
                yield {"model": name, "phase": "prefill", **row}
            print(f"\n{name}: one decoding step, {self.setup.context} tokens of each sequence\n{_DECODE_HEAD}")
            for row in self._decodes(model, work, rates["copy_bytes_per_s"]):
                yield {"model": name, "phase": "decode", **row}
            del model
            free_memory(self.device)

    def _prefills(self, model: CausalLM, work: Work, rate: float) -> Iterator[dict[str, object]]:
        tokens = self.setup.prompt
        for chunk in self.setup.chunks:
            passes = -(-tokens // chunk)
            reading = self._measured(lambda size=chunk: Prefill(model, tokens, size, self.device))  # type: ignore[misc]
            row: dict[str, object] = {"chunk_tokens": chunk, "prompt_tokens": tokens}
            start = f"{chunk:>6} {passes:>6} "
            if isinstance(reading, Failed):
                print(start + reading.reason, flush=True)
                yield {**row, "error": reading.reason}
                continue
            flops_per_s = work.prompt_flops(tokens, passes) / reading.median_s
            print(
                f"{start}{duration(reading.median_s):>10} {tokens / reading.median_s:>9,.0f} "
                f"{flops_per_s / 1e12:>8.3g} {flops_per_s / rate:>8.1%} {memory(reading):>10}",
                flush=True,
            )
            yield {**row, **reading.as_dict(), "flops_per_s": flops_per_s, "share_of_matrix_rate": flops_per_s / rate}

    def _decodes(self, model: CausalLM, work: Work, rate: float) -> Iterator[dict[str, object]]:
        context = self.setup.context
        for sequences in self.setup.batches:
            for captured in (True, False) if self.device.type == "cuda" else (False,):
                model.capture = captured
                reading = self._measured(lambda many=sequences: Decoding(model, many, context, self.device))  # type: ignore[misc]
                row: dict[str, object] = {"sequences": sequences, "context": context, "captured": captured}
                start = f"{sequences:>9} {'captured' if captured else 'launched':>9} "
                if isinstance(reading, Failed):
                    print(start + reading.reason, flush=True)
                    yield {**row, "error": reading.reason}
                    continue
                count = work.step_bytes(sequences, context)
                bytes_per_s = count / reading.median_s
                print(
                    f"{start}{duration(reading.median_s):>10} {sequences / reading.median_s:>9,.0f} "
                    f"{count / 1e9:>6.3g} {bytes_per_s / 1e9:>6,.0f} {bytes_per_s / rate:>8.1%} {memory(reading):>10}",
                    flush=True,
                )
                yield {
                    **row,
                    **reading.as_dict(),
                    "bytes": count,
                    "bytes_per_s": bytes_per_s,
                    "share_of_bandwidth": bytes_per_s / rate,
                }

    def _measured(self, make: Callable[[], Callable[[], object]]) -> Reading | Failed:
        free_memory(self.device)
        try:
            work = make()
        except torch.OutOfMemoryError:
            return Failed("out of memory")
        return measure(work, self.device, self.warm_up, self.repeats)
