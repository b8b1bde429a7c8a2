"""The model card that lies beside the weights, and the figures it quotes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from common.models.demo.clips import COLOURS, FPS, FRAME_COUNTS, SIZES, Action, Shape
from common.models.demo.evaluate import Outcome, report, table
from common.models.demo.export import NAME, folder_bytes

FIGURES, CARD = "figures.json", "MODEL_CARD.md"

_TEXT = """# {name}

A small text-to-video model of the Open-Sora 1.2 architecture (STDiT3, spatial and temporal VAE, T5, rectified
flow), trained from nothing on drawn clips. It exists so that the whole of Triptych can be run and tested on any
machine; it knows one coloured shape doing one thing, and nothing else.

| part | class | parameters |
| --- | --- | ---: |
| `transformer` | `STDiT3` | {transformer:,} |
| `vae` | `OpenSoraVAE`, 8x8 pixels and 4 frames to one latent | {vae:,} |
| `text_encoder` | `T5EncoderModel`, with its own byte-pair tokenizer | {text_encoder:,} |

Stored in half precision, {megabytes:.1f} MB in all.

## What to ask for

- Colours: {colours}. Shapes: {shapes}.
- Actions: moving right, left, up or down; growing; shrinking; bouncing; spinning (not circles: it would not show).
- "small" and "big" are understood, but not of what grows or shrinks.
- Sizes {sizes}; {frames} frames, made for {fps} a second.

Examples: "a red circle moving right", "an animation of a big blue star spinning", "the green square bounces".

## How it was made

`python -m common.models.demo.train`: seed {seed}, {machine}. Drawn clips (`clips.py`) with captions from a
grammar (`captions.py`); no data from anywhere else. Muon on matrices, AdamW on the rest, averaged weights.

| stage | minutes |
| --- | ---: |
{stages}

## Quality

`python -m common.models.demo.evaluate`: {videos} videos from wordings that training never uses, at the default
steps and guidance, all sizes and lengths, measured by their pixels (`measure.py`).

{quality}

Colour right {colour:.1%}, the right motion done smoothly {motion_smooth:.1%}, everything right {all:.1%}.

## Limits

One object on a dark background. Words outside its small vocabulary are read past; a prompt with two objects, an
unknown shape or an unknown action gives one of those it knows, or a blend of them.

License: Apache-2.0.
"""


def write_card(folder: Path, outcomes: Sequence[Outcome], seconds: float, facts: Mapping[str, object]) -> None:
    """Write figures.json and MODEL_CARD.md into a model folder.

    facts: `seed`, `machine` and `stage_minutes` (name to minutes) of the training.
    """
    figures = report(outcomes, seconds)
    (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    minutes = facts["stage_minutes"]
    shares = figures["shares"]
    if not isinstance(minutes, Mapping) or not isinstance(shares, Mapping):
        raise ValueError("a model card needs stage_minutes, and figures with shares")
    (folder / CARD).write_text(
        _TEXT.format(
            name=NAME,
            **{part: _parameters(folder / part) for part in ("transformer", "vae", "text_encoder")},
            megabytes=folder_bytes(folder) / 1e6,
            colours=", ".join(COLOURS),
            shapes=", ".join(Shape),
            actions=", ".join(Action),
            sizes=", ".join(f"{width}x{height}" for width, height in SIZES),
            frames=", ".join(str(count) for count in FRAME_COUNTS),
            fps=FPS,
            seed=facts["seed"],
            machine=facts["machine"],
            stages="\n".join(f"| {name} | {value:.1f} |" for name, value in minutes.items()),
            videos=len(outcomes),
            quality=table(outcomes),
            **shares,
        )
    )


def _parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        counts = []
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            size = 1
            for length in weights.get_slice(name).get_shape():
                size *= length
            counts.append(size)
    return sum(counts)
