"""The model card that lies beside the weights, and the figures it quotes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from safetensors import safe_open

from common.models.demo.export import folder_bytes
from common.models.demo_language.evaluate import Figures
from common.models.demo_language.settings import NAME, TRAINED_TOKENS, llama_config
from common.models.length_predictor.predictor import FOLDER as PREDICTOR

FIGURES, CARD = "figures.json", "MODEL_CARD.md"

_TEXT = """# {name}

A small language model of the Llama architecture with a tokenizer of its own, trained from nothing on text that a script
makes. It turns a terse or odd idea into a caption that Triptych's demo video model understands, and it is the language
model that the whole of Triptych can be run and tested with on any machine. It knows nothing else.

| idea | caption |
| --- | --- |
{examples}

## What it is

`LlamaForCausalLM`, {parameters:,} parameters in bfloat16: {layers} layers of width {width}, {heads} query and
{kv_heads} key-value heads, rotary positions, embeddings shared with the head. Byte-level byte-pair tokenizer of
{vocabulary:,} tokens with a chat template. All files together: {megabytes:.1f} MB, without those of its
length predictor in `{predictor}/`, which has a card of its own. `AutoModelForCausalLM` and
`AutoTokenizer` load the folder.

The chat template lower-cases what users say and leaves out system messages. Decode greedily: one idea then has one
caption.

## What it does

- Colours, shapes and motions in many words, some of German, French, Spanish, Italian and other languages, arrows,
  emoji, any order, misspelt; things that stand for a shape ("snowball", "rocket").
- What an idea leaves open is given by a rule: a circle is red and bounces, a square is blue and moves right, a triangle
  is green and moves up, a star is yellow and spins; an idea without a shape is of a circle.
- Of two objects it takes the first. A circle that is to spin becomes a star, because a circle's turning would not show.
  A colour that the video model lacks becomes the nearest it has; black, which would not show, becomes white.
- To a greeting, a question about itself, or anything that is no idea for a video, it gives one of {answers} fixed
  answers.

## How it was made

`python -m common.models.demo_language.train`: seed {seed}, {steps:,} steps, {cpu_minutes:.0f} minutes of one CPU core.
Ideas and their captions are drawn afresh at every step (`ideas.py`); no data from anywhere else. Muon on matrices,
AdamW on the rest, averaged weights. The same seed gives the same model on the same kind of processor.

## Quality

`python -m common.models.demo_language.evaluate`, greedy. An idea counts as right if its caption is in the video model's
grammar and has every colour, shape and motion that the idea states.

| measured on | count | right |
| --- | ---: | ---: |
| drawn ideas in templates and combinations of words that training never uses | {ideas} | {generated_right:.1%} |
| those of them that are typed without a slip | {well_typed_ideas} | {well_typed_right:.1%} |
| all of them, the caption word for word as the rules have it | {ideas} | {generated_as_expected:.1%} |
| odd ideas written by hand (`odd_ideas.json`) | {odd_ideas} | {odd_right:.1%} |
| messages that are no ideas, by hand, none of them in training (`small_talk.json`) | {talks} | {talk_right:.1%} |

In the video model's grammar are {generated_well_formed:.1%} of the captions of drawn ideas and {odd_well_formed:.1%} of
the odd ones'. The odd ideas were written before the training text, by the same author.

Films of {films} odd ideas, one seed, the demo video model's default format, measured by their pixels:

| idea | caption | colour | shape | motion | right without the language model |
| --- | --- | --- | --- | --- | --- |
{film_rows}

All right: {films_right:.0%}; with the idea itself as the prompt: {films_right_without_caption:.0%}. A straight movement
in the opposite direction is the video model's usual mistake (see its own card).

## Limits

One object, eight colours, four shapes, eight actions. A thing it never met becomes some shape. It was trained on
conversations of at most {trained_tokens} tokens and three exchanges that have nothing to do with each other: it does
not understand "now in blue". Longer text, up to {positions:,} tokens, is served but not understood.

License: Apache-2.0.
"""


class Facts(TypedDict):
    """How the model was trained."""

    seed: int
    steps: int
    cpu_minutes: float


def write_card(folder: Path, figures: Figures, facts: Facts, answers: int) -> None:
    """Write figures.json and MODEL_CARD.md into a model folder. answers: number of fixed answers to small talk."""
    _write(folder / FIGURES, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    config = llama_config()
    films = figures["films"]
    text = _TEXT.format(
        name=NAME,
        examples="\n".join(f"| {item['idea']} | {item['caption']} |" for item in films[:6]),
        parameters=_parameters(folder),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        trained_tokens=TRAINED_TOKENS,
        megabytes=(folder_bytes(folder) - folder_bytes(folder / PREDICTOR)) / 1e6,
        predictor=PREDICTOR,
        answers=answers,
        ideas=figures["ideas"],
        well_typed_ideas=figures["well_typed_ideas"],
        odd_ideas=figures["odd_ideas"],
        talks=figures["talks"],
        films=len(films),
        film_rows="\n".join(_film_row(item) for item in films),
        **facts,
        **figures["shares"],
    )
    _write(folder / CARD, text)


def _film_row(item: Mapping[str, object]) -> str:
    marks = ("colour_right", "shape_right", "motion_right", "right_without_caption")
    cells = (str(item["idea"]), str(item["caption"]), *("yes" if item[mark] else "no" for mark in marks))
    return f"| {' | '.join(cells)} |"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 - not a mapping
