"""What a video model is to the rest of Triptych: where its parts are, what it can be asked for. Needs no torch.

A model folder has a `model_index.json` beside one folder for each part. The published Open-Sora 1.2 has no such
file; `OPEN_SORA_1_2` stands for it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.models.opensora.errors import ModelLoadError

MODEL_INDEX = "model_index.json"


@dataclass(frozen=True)
class FlowOptions:
    """The options of `RectifiedFlow` that belong to a model."""

    num_timesteps: int = 1000
    use_timestep_transform: bool = False
    transform_scale: float = 1.0
    use_discrete_timesteps: bool = False


@dataclass(frozen=True)
class VideoDefaults:
    """What a request gets that does not say. size: (width, height) in pixels; fps: frames per second."""

    size: tuple[int, int]
    frames: int
    fps: int
    steps: int
    guidance_scale: float


@dataclass(frozen=True)
class VideoModelSpec:
    """A video model and its limits.

    text_encoder, transformer, vae: a folder or a hub name each. sizes: (width, height) in pixels. Ranges include
    both ends.
    """

    name: str
    text_encoder: str
    transformer: str
    vae: str
    sizes: tuple[tuple[int, int], ...]
    frames: tuple[int, ...]
    defaults: VideoDefaults
    fps_range: tuple[int, int]
    steps_range: tuple[int, int]
    guidance_range: tuple[float, float]
    max_prompt_tokens: int
    flow: FlowOptions = field(default_factory=FlowOptions)
    license: str = "unknown"
    family: str = "opensora"

    def __post_init__(self) -> None:
        wrong = [
            (self.defaults.size not in self.sizes, f"default size {self.defaults.size} is not one of sizes"),
            (self.defaults.frames not in self.frames, f"default frames {self.defaults.frames} is not one of frames"),
            (not _within(self.defaults.fps, self.fps_range), "default fps is outside fps_range"),
            (not _within(self.defaults.steps, self.steps_range), "default steps is outside steps_range"),
            (
                not _within(self.defaults.guidance_scale, self.guidance_range),
                "default guidance_scale is outside guidance_range",
            ),
            (self.fps_range[0] < 1 or self.steps_range[0] < 1, "fps and steps start at 1"),
            (min(self.frames, default=0) < 1, "frames must be positive numbers"),
            (self.max_prompt_tokens < 1, "max_prompt_tokens must be positive"),
        ]
        problems = [message for is_wrong, message in wrong if is_wrong]
        if problems:
            raise ValueError("; ".join(problems))

    def to_dict(self) -> dict[str, object]:
        """The content of a model_index.json."""
        defaults = self.defaults
        return {
            "name": self.name,
            "family": self.family,
            "license": self.license,
            "components": {"text_encoder": self.text_encoder, "transformer": self.transformer, "vae": self.vae},
            "sizes": [list(size) for size in self.sizes],
            "frames": list(self.frames),
            "defaults": {
                "size": list(defaults.size),
                "frames": defaults.frames,
                "fps": defaults.fps,
                "steps": defaults.steps,
                "guidance_scale": defaults.guidance_scale,
            },
            "fps_range": list(self.fps_range),
            "steps_range": list(self.steps_range),
            "guidance_range": list(self.guidance_range),
            "max_prompt_tokens": self.max_prompt_tokens,
            "flow": vars(self.flow).copy(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VideoModelSpec":
        """Read the content of a model_index.json. Raises ValueError or TypeError for what does not fit."""
        components, defaults = values["components"], values["defaults"]
        _refuse_unknown(values, _KEYS)
        _refuse_unknown(components, _COMPONENTS)
        return cls(
            name=str(values["name"]),
            family=str(values["family"]),
            license=str(values.get("license", "unknown")),
            text_encoder=str(components["text_encoder"]),
            transformer=str(components["transformer"]),
            vae=str(components["vae"]),
            sizes=tuple((int(width), int(height)) for width, height in values["sizes"]),
            frames=tuple(int(count) for count in values["frames"]),
            defaults=VideoDefaults(**{**defaults, "size": _pair(defaults["size"], int)}),
            fps_range=_pair(values["fps_range"], int),
            steps_range=_pair(values["steps_range"], int),
            guidance_range=_pair(values["guidance_range"], float),
            max_prompt_tokens=int(values["max_prompt_tokens"]),
            flow=FlowOptions(**values.get("flow", {})),
        )


_COMPONENTS = frozenset({"text_encoder", "transformer", "vae"})
_KEYS = frozenset(
    {
        "name",
        "family",
        "license",
        "components",
        "sizes",
        "frames",
        "defaults",
        "fps_range",
        "steps_range",
        "guidance_range",
        "max_prompt_tokens",
        "flow",
    }
)


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def _pair(values: Any, kind: type[Any]) -> tuple[Any, Any]:
    first, second = values
    return kind(first), kind(second)


def _refuse_unknown(values: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown keys: {', '.join(unknown)}")


OPEN_SORA_1_2 = VideoModelSpec(
    name="hpcai-tech/OpenSora-STDiT-v3",
    text_encoder="DeepFloyd/t5-v1_1-xxl",
    transformer="hpcai-tech/OpenSora-STDiT-v3",
    vae="hpcai-tech/OpenSora-VAE-v1.2",
    sizes=(
        (256, 144),
        (144, 256),
        (192, 192),
        (426, 240),
        (240, 426),
        (320, 320),
        (640, 360),
        (360, 640),
        (480, 480),
        (854, 480),
        (480, 854),
        (640, 640),
        (1280, 720),
        (720, 1280),
        (960, 960),
    ),
    frames=(1, 51, 102, 204, 408),
    defaults=VideoDefaults(size=(426, 240), frames=51, fps=24, steps=30, guidance_scale=7.0),
    fps_range=(1, 60),
    steps_range=(1, 200),
    guidance_range=(1.0, 20.0),
    max_prompt_tokens=300,
    flow=FlowOptions(use_timestep_transform=True),
    license="Apache-2.0",
)

PUBLISHED = {OPEN_SORA_1_2.name: OPEN_SORA_1_2}

# The models in this repository, by the name they are asked for.
SHIPPED = {"demo": Path(__file__).parent.parent / "demo" / "weights"}


def load_spec(location: str | Path) -> VideoModelSpec:
    """Read the spec of a model folder, with its parts' folders made absolute, or of a known model by name.

    Raises ModelLoadError.
    """
    folder = SHIPPED.get(str(location), Path(location))
    if not folder.exists() and str(location) in PUBLISHED:
        return PUBLISHED[str(location)]
    index = folder / MODEL_INDEX
    if not index.is_file():
        known = ", ".join((*SHIPPED, *PUBLISHED))
        raise ModelLoadError(
            f"{location}: no {MODEL_INDEX} there; give a model folder that has one, or one of: {known}"
        )
    try:
        spec = VideoModelSpec.from_dict(json.loads(index.read_text()))
    except KeyError as error:
        raise ModelLoadError(f"{index}: the key {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ModelLoadError(f"{index}: {error}") from error
    if spec.family != "opensora":
        raise ModelLoadError(f"{index}: family is {spec.family!r}, only 'opensora' is read here")
    return replace(
        spec,
        text_encoder=_located(folder, spec.text_encoder),
        transformer=_located(folder, spec.transformer),
        vae=_located(folder, spec.vae),
    )


def save_spec(spec: VideoModelSpec, folder: Path) -> None:
    """Write `model_index.json` into a model folder; parts inside that folder are written relative to it."""
    folder.mkdir(parents=True, exist_ok=True)
    written = replace(
        spec,
        text_encoder=_relative(folder, spec.text_encoder),
        transformer=_relative(folder, spec.transformer),
        vae=_relative(folder, spec.vae),
    )
    content = json.dumps(written.to_dict(), indent=2)
    (folder / MODEL_INDEX).write_text(content + "\n")


def _located(folder: Path, part: str) -> str:
    inside = folder / part
    return str(inside.resolve()) if inside.exists() else part


def _relative(folder: Path, part: str) -> str:
    path = Path(part)
    if path.is_absolute() and path.is_relative_to(folder.resolve()):
        return str(path.relative_to(folder.resolve()))
    return part
