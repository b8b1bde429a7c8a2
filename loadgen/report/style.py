"""Style sheet and script of the page. They go into it: it must open from a file, without a network."""

from collections.abc import Sequence
from pathlib import Path

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")

# For light and for dark ground. The policies that matter most have the strongest colours.
_COLOURS = {
    "elastic": ("#c2255c", "#ff6b9d"),
    "ddit": ("#1864ab", "#5aa9ff"),
    "ddit-no-promotion": ("#4dabf7", "#2f7fc4"),
    "ddit-no-decoupling": ("#15aabf", "#2aa5b5"),
    "ddit-waiting-first": ("#3b5bdb", "#8fa3ff"),
    "dp": ("#7048e8", "#a58bff"),
    "sdop:1": ("#2b8a3e", "#69db7c"),
    "sdop:2": ("#74b816", "#a9e34b"),
    "sdop:4": ("#8d6e2f", "#d9b25f"),
    "spci": ("#e67700", "#ffa94d"),
    "dpci": ("#d9480f", "#ff8a5c"),
    "fifo": ("#868e96", "#868e96"),
    "srtf": ("#212529", "#f1f3f5"),
    "edf": ("#846358", "#c9a598"),
    "fluid": ("#c2255c", "#ff6b9d"),
    "tetriinfer": ("#1864ab", "#5aa9ff"),
    "coupled-16": ("#868e96", "#868e96"),
    "coupled-x2": ("#2b8a3e", "#69db7c"),
}
_SPARE = ("#5c7cfa", "#91a7ff")
_DASHED = ("sdop:1", "sdop:2", "sdop:4", "spci", "dpci", "fifo")


def policy_colours(policies: Sequence[tuple[str, str]]) -> str:
    """Rules for each policy, given with its class: its colour, and dashes for the static ones."""
    light = "".join(f".{css}{{--c:{_COLOURS.get(name, _SPARE)[0]}}}" for name, css in policies)
    dark = "".join(f".{css}{{--c:{_COLOURS.get(name, _SPARE)[1]}}}" for name, css in policies)
    dashes = "".join(f"g.{css} polyline{{stroke-dasharray:5 3}}" for name, css in policies if name in _DASHED)
    return f"{light}@media(prefers-color-scheme:dark){{{dark}}}{dashes}"
