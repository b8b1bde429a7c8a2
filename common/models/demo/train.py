"""Trains the demo video model from nothing and writes it as a model folder.

    python -m common.models.demo.train                 # everything, at most 90 minutes on two CPU cores
    python -m common.models.demo.train --resume        # go on after an interruption
    python -m common.models.demo.train --stages dit export evaluate --resume

Every stage leaves its checkpoint in the working folder, so each can be run on its own after those before it.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.multiprocessing.spawn import start_processes

from common.models.demo.card import write_card
from common.models.demo.dataset import EncodedBucket, encode_buckets, latent_statistics
from common.models.demo.dit_stage import DiTModels, load_dit, train_dit
from common.models.demo.evaluate import contact_sheet, make_cases, run_cases, table
from common.models.demo.export import WEIGHTS, export, folder_bytes
from common.models.demo.loop import Budget, generator_of
from common.models.demo.parallel import Workers, join, leave
from common.models.demo.pool import ClipPool
from common.models.demo.settings import FULL, MAX_PROMPT_TOKENS, Budgets
from common.models.demo.tokenizer import load_tokenizer, train_tokenizer
from common.models.demo.vae_stage import load_vae, reconstruction_psnr, train_vae
from common.models.memory import keep_freed_memory
from common.models.opensora.pipeline import OpenSoraPipeline
from common.models.opensora.spec import load_spec

_MINUTES = "minutes.json"
STAGES = ("vae", "latents", "dit", "export", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="model folder to write")
    parser.add_argument("--work", type=Path, default=Path("out/demo-training"), help="checkpoints and latents")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the working folder")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full budget, to try things out")
    parser.add_argument("--workers", type=int, help="processes (default: one for each CPU core, 1 on a GPU)")
    options = parser.parse_args()
    options.device = _device(options.device)
    options.work.mkdir(parents=True, exist_ok=True)
    count = options.workers or (1 if options.device != "cpu" else min(8, len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory() as meeting:
        start_processes(_work, (count, Path(meeting) / "meeting", options), nprocs=count, start_method="spawn")  # type: ignore[no-untyped-call]


def _work(rank: int, count: int, meeting: Path, options: argparse.Namespace) -> None:
    keep_freed_memory()
    workers = join(rank, count, meeting)
    trainer = Trainer(
        options.work,
        options.output,
        torch.device(options.device),
        options.seed,
        options.resume,
        scaled(FULL, options.scale),
        workers,
    )
    trainer.run(options.stages)
    leave(workers)


def scaled(budgets: Budgets, share: float) -> Budgets:
    """The same budgets, all multiplied by `share`."""

    def part(budget: Budget) -> Budget:
        return Budget(steps=max(1, round(budget.steps * share)), seconds=budget.seconds * share)

    return replace(
        budgets,
        spatial=part(budgets.spatial),
        temporal=part(budgets.temporal),
        joint=part(budgets.joint),
        dit=part(budgets.dit),
        clips_in_pool=max(28, round(budgets.clips_in_pool * share)),
        latent_share=budgets.latent_share * share,
    )


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


class Trainer:
    """The stages, each of which reads what the ones before it left in the working folder."""

    def __init__(
        self,
        work: Path,
        output: Path,
        device: torch.device,
        seed: int,
        resume: bool,
        budgets: Budgets,
        workers: Workers,
    ) -> None:
        self._work, self._output, self._device = work, output, device
        self._seed, self._resume, self._budgets, self._workers = seed, resume, budgets, workers

    def run(self, stages: tuple[str, ...] | list[str]) -> None:
        steps = {
            "vae": self.vae,
            "latents": self.latents,
            "dit": self.dit,
            "export": self.export,
            "evaluate": self.evaluate,
        }
        for name in STAGES:
            if name in stages and (self._workers.first or name not in ("export", "evaluate")):
                started_s = time.monotonic()
                steps[name]()
                minutes = (time.monotonic() - started_s) / 60
                self._note_minutes(name, minutes)
                self._say(f"{name}: done in {minutes:.1f} min")

    def _note_minutes(self, name: str, minutes: float) -> None:
        """Keep the minutes of the training stages, those before a resumption included, for the model card."""
        if self._workers.first and name in ("vae", "latents", "dit"):
            noted = self._noted_minutes()
            before = noted.get(name, 0.0) if self._resume else 0.0
            (self._work / _MINUTES).write_text(json.dumps({**noted, name: before + minutes}))

    def _noted_minutes(self) -> dict[str, float]:
        path = self._work / _MINUTES
        noted: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        return noted

    def _say(self, line: str) -> None:
        if self._workers.first:
            print(line, flush=True)

    def vae(self) -> None:
        vae = train_vae(self._work, self._budgets, self._seed, self._device, self._resume, self._workers)
        if self._workers.first:
            psnr = reconstruction_psnr(vae, ClipPool(28, generator_of(self._seed, 90)))
            self._say(f"vae: {psnr:.1f} dB on clips it never saw")

    def latents(self) -> None:
        self._encoded(self._workers)

    def _encoded(self, workers: Workers) -> list[EncodedBucket]:
        vae = load_vae(self._work, self._device)
        folder = self._work / "latents"
        return encode_buckets(vae, folder, self._budgets.latent_share, self._seed + 10, workers)

    def dit(self) -> None:
        tokenizer = train_tokenizer(generator_of(self._seed, 20), MAX_PROMPT_TOKENS)
        if self._workers.first:
            tokenizer.save_pretrained(self._work / "tokenizer")
        models = DiTModels.build(tokenizer, self._seed + 21)
        train_dit(
            models,
            self._encoded(self._workers),
            self._work,
            self._budgets.dit,
            self._seed + 22,
            self._device,
            self._resume,
            self._workers,
        )

    def export(self) -> None:
        models = DiTModels.build(load_tokenizer(self._work / "tokenizer"), self._seed + 21)
        load_dit(models, self._work)
        vae = load_vae(self._work, torch.device("cpu"))
        export(vae, latent_statistics(self._encoded(Workers())), models, self._output)
        print(f"export: {folder_bytes(self._output) / 1e6:.1f} MB in {self._output}", flush=True)

    def evaluate(self) -> None:
        started_s = time.monotonic()
        pipeline = OpenSoraPipeline(load_spec(self._output), self._device)
        outcomes = run_cases(pipeline, make_cases(96, seed=7))
        place = f"{self._workers.count} CPU cores" if self._device.type == "cpu" else torch.cuda.get_device_name()
        facts = {"seed": self._seed, "machine": place, "stage_minutes": self._noted_minutes()}
        write_card(self._output, outcomes, time.monotonic() - started_s, facts)
        contact_sheet(outcomes).save(self._work / "sheet.png")
        print(table(outcomes), flush=True)


if __name__ == "__main__":
    main()
