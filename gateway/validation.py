"""Makes a complete ``VideoRequest`` of what a client asked for and what the model can do. Pure."""

import math
import re
from typing import TypeVar

from common.messages.cluster import VideoModelInfo
from common.messages.video import VideoRequest
from gateway.errors import ApiError, invalid
from gateway.schemas import DEFAULT_PRIORITY, PRIORITIES, CreateVideo

Number = TypeVar("Number", int, float)

# No tokenizer runs here: the encoder counts tokens and fails a job with the code "prompt_too_long". This only bounds
# what is stored and sent about; the longest pieces of common vocabularies have 16 characters.
MAX_CHARACTERS_PER_TOKEN = 16

_LONGEST_DEADLINE_S = 365 * 24 * 3600

_SIZE = re.compile(r"\s*([0-9]{1,5})\s*[xX×*]\s*([0-9]{1,5})\s*")
_SECONDS = re.compile(r"\s*([0-9]{1,6}(\.[0-9]{0,12})?|\.[0-9]{1,12})\s*s?\s*")


def resolve(asked: CreateVideo, model: VideoModelInfo, random_seed: int, now_s: float) -> VideoRequest:
    """Fill in the defaults and check every value against ``model``. ``now_s`` (Unix) is what a deadline counts from.

    Raises:
        ApiError: 400, naming the field and what the model can do.
    """
    width, height = _size(asked.size, model)
    fps = _within("fps", asked.fps, model.fps, model.default_fps, model.name)
    return VideoRequest(
        model=model.name,
        prompt=_prompt("prompt", asked.prompt, model),
        negative_prompt=_prompt("negative_prompt", asked.negative_prompt or "", model),
        width=width,
        height=height,
        frames=_frames(asked, fps, model),
        fps=fps,
        steps=_within("steps", asked.steps, model.steps, model.default_steps, model.name),
        guidance_scale=_within(
            "guidance_scale", asked.guidance_scale, model.guidance_scale, model.default_guidance_scale, model.name
        ),
        seed=random_seed if asked.seed is None else asked.seed,
        priority=_priority(asked.priority),
        deadline_s=_deadline_s(asked.deadline, now_s),
    )


def longest_prompt(model: VideoModelInfo) -> int:
    """The most characters of a prompt that may be sent to ``model``."""
    return model.max_prompt_tokens * MAX_CHARACTERS_PER_TOKEN


def size_text(width: int, height: int) -> str:
    return f"{width}x{height}"


def seconds_text(frames: int, fps: int) -> str:
    """The duration in seconds, exact enough that sending it back gives the same frames."""
    return f"{frames / fps:.6g}"


def _prompt(field: str, text: str, model: VideoModelInfo) -> str:
    if field == "prompt" and not text.strip():
        raise invalid(field, "'prompt' is empty; say what the video should show.", "empty_prompt")
    most = longest_prompt(model)
    if len(text) > most:
        raise invalid(
            field,
            f"{field!r} has {len(text)} characters; {model.name} reads at most {model.max_prompt_tokens} tokens, which "
            f"is never more than {most} characters. Shorten it.",
            "prompt_too_long",
        )
    return text


def _size(asked: str | None, model: VideoModelInfo) -> tuple[int, int]:
    if asked is None:
        return model.default_size
    can = ", ".join(size_text(*size) for size in model.sizes)
    parsed = _SIZE.fullmatch(asked)
    if parsed is None:
        raise invalid("size", f"'size' must be WIDTHxHEIGHT in pixels, not {asked[:40]!r}. {model.name} makes {can}.")
    size = int(parsed[1]), int(parsed[2])
    if size not in model.sizes:
        raise invalid("size", f"{model.name} cannot make {size_text(*size)}; it makes {can}.", "unsupported_size")
    return size


def _frames(asked: CreateVideo, fps: int, model: VideoModelInfo) -> int:
    if asked.frames is not None and asked.frames not in model.frames:
        can = ", ".join(map(str, model.frames))
        raise invalid(
            "frames", f"{model.name} cannot make {asked.frames} frames; it makes {can}.", "unsupported_frames"
        )
    if asked.seconds is None:
        return model.default_frames if asked.frames is None else asked.frames
    seconds = _seconds(asked.seconds)
    frames = round(seconds * fps)
    if asked.frames is not None and asked.frames != frames:
        raise invalid(
            "seconds",
            f"'frames' {asked.frames} at {fps} fps last {seconds_text(asked.frames, fps)} s, but 'seconds' says "
            f"{seconds:g}. Leave one of the two out.",
            "contradictory_fields",
        )
    if frames not in model.frames:
        raise _impossible_duration(seconds, fps, model)
    return frames


def _impossible_duration(seconds: float, fps: int, model: VideoModelInfo) -> ApiError:
    can = ", ".join(f"{seconds_text(frames, fps)} s ({frames} frames)" for frames in model.frames)
    other = [
        f"fps {rate}"
        for rate in range(model.fps[0], model.fps[1] + 1)
        if round(seconds * rate) in model.frames and math.isclose(seconds * rate, round(seconds * rate), abs_tol=1e-3)
    ]
    hint = f" With {' or '.join(other[:3])} it could." if other else ""
    return invalid(
        "seconds",
        f"{model.name} cannot make {seconds:g} s at {fps} fps; it makes {can}.{hint}",
        "unsupported_seconds",
    )


def _seconds(asked: str | int | float) -> float:
    if isinstance(asked, str):
        parsed = _SECONDS.fullmatch(asked)
        if parsed is None:
            raise invalid("seconds", f"'seconds' must be a number such as 2 or \"2\", not {asked[:40]!r}.")
        asked = float(parsed[1])
    if not 0 < asked <= 1_000_000:
        raise invalid("seconds", f"'seconds' must be above 0, not {_shown(asked)}.")
    return float(asked)


def _priority(asked: int | None) -> int:
    least, most = PRIORITIES
    if asked is not None and not least <= asked <= most:
        raise invalid(
            "priority",
            f"'priority' must be from {least} to {most}, not {_shown(asked)}; the higher goes first, usual is "
            f"{DEFAULT_PRIORITY}.",
        )
    return DEFAULT_PRIORITY if asked is None else asked


def _deadline_s(asked: float | None, now_s: float) -> float | None:
    """The deadline in Unix seconds."""
    if asked is None:
        return None
    if not 0 < asked <= _LONGEST_DEADLINE_S:
        raise invalid(
            "deadline",
            f"'deadline' must be seconds from now, above 0 and at most {_LONGEST_DEADLINE_S:,} (a year), not "
            f"{_shown(asked)}. Leave it out where there is none.",
        )
    return now_s + asked


def _within(field: str, asked: Number | None, limits: tuple[Number, Number], default: Number, model: str) -> Number:
    if asked is None:
        return default
    least, most = limits
    if not least <= asked <= most:
        raise invalid(
            field,
            f"{field!r} must be from {least:g} to {most:g} for {model}, not {_shown(asked)}.",
            f"unsupported_{field}",
        )
    return asked


def _shown(number: float) -> str:
    """A number as text of bounded length; whole ones may be too large for a float."""
    return f"{number:.12g}" if abs(number) < 1e300 else f"{str(number)[:12]}..."
