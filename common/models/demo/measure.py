"""Measures a clip by its pixels: which colour, shape and action it shows, and whether it does so smoothly.

Nothing here knows the model. The object is what is brighter than the dark backgrounds; its soft coverage gives
centroid and area to a fraction of a pixel. Limits in pixels are for 64 pixels on the shorter side and scale with it.
Real clips pass; clips with shuffled frames, a wrong colour or a jumping object do not (the tests show both).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.models.demo.clips import BOUNCES, COLOURS, MOVES, Action, ClipSpec, Frames, Shape, Subject, draw

Floats = NDArray[np.float64]

_DARK, _LIT = 80.0, 165.0
_SMALLEST_AREA = 0.004
_COLOUR_SHARE = 0.8
_WHITE_SATURATION = 0.28
_LIMIT_RESIDUAL_PX = 2.0
_LIMIT_STEP_PX = 3.0
_LIMIT_DRIFT_PX = 4.0
_LIMIT_AREA_VARIATION = 0.15
_LIMIT_GROWTH_RESIDUAL = 0.06
_LIMIT_TURN_RESIDUAL_DEGREES = 12.0
_LEAST_GROWTH = 1.35
_LEAST_MOVE = 0.15
_LEAST_HOP = 0.12
_LEAST_TURN_DEGREES = 45.0
_SYMMETRY = {Shape.SQUARE: 4, Shape.TRIANGLE: 3, Shape.STAR: 5, Shape.CIRCLE: 2}
_HARMONICS = (2, 3, 4, 5)


@dataclass(frozen=True)
class Measurement:
    """What a clip shows. `colour_share`: share of the object's pixels that have the colour; residuals in pixels
    of the real picture (degrees for a spin, a share of the mean size for growth)."""

    colour: str | None
    colour_share: float
    shape: Shape | None
    action: Action | None
    smooth: bool
    residual: float
    drift_px: float
    area_variation: float

    def colour_right(self, subject: Subject) -> bool:
        return self.colour == subject.colour and self.colour_share >= _COLOUR_SHARE

    def shape_right(self, subject: Subject) -> bool:
        return self.shape == subject.shape

    def motion_right(self, subject: Subject) -> bool:
        """The right action, done smoothly."""
        return self.action == subject.action and self.smooth

    def all_right(self, subject: Subject) -> bool:
        return self.colour_right(subject) and self.shape_right(subject) and self.motion_right(subject)


@dataclass(frozen=True)
class Track:
    """The object frame by frame: centroid in pixels, area in square pixels, angular harmonics [T, 4]."""

    x: Floats
    y: Floats
    area: Floats
    fill: Floats
    harmonics: NDArray[np.complex128]


def measure(frames: Frames) -> Measurement:
    """Measure uint8 frames [T, H, W, 3]. Raises ``ValueError`` for any other shape or type."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {frames.shape}")
    coverage = np.clip((frames.max(axis=-1).astype(np.float64) - _DARK) / (_LIT - _DARK), 0, 1)
    _, height, width = coverage.shape
    if coverage.mean(axis=(1, 2)).min() < _SMALLEST_AREA:
        return Measurement(None, 0.0, None, None, False, math.inf, math.inf, math.inf)
    track = follow(coverage)
    colour, share = classify_colour(frames[coverage >= 0.999])
    shape = classify_shape(track)
    scale = min(width, height) / 64
    action = classify_action(track, shape, width, height)
    residual, smooth = _smoothness(track, shape, action, scale)
    return Measurement(
        colour=colour,
        colour_share=share,
        shape=shape,
        action=action,
        smooth=smooth,
        residual=residual,
        drift_px=_drift(track, action),
        area_variation=float(track.area.std() / track.area.mean()),
    )


def follow(coverage: Floats) -> Track:
    """Track the object through its soft coverage [T, H, W]."""
    _, height, width = coverage.shape
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    area = coverage.sum(axis=(1, 2))
    x = (coverage.sum(axis=1) @ columns) / area
    y = (coverage.sum(axis=2) @ rows) / area
    across = columns[None, None, :] - x[:, None, None]
    down = rows[None, :, None] - y[:, None, None]
    squared = across**2 + down**2
    weighted = coverage * squared
    unit = (across + 1j * down) / np.sqrt(np.maximum(squared, 1e-9))
    total = weighted.sum(axis=(1, 2))
    harmonics = np.stack([(weighted * unit**n).sum(axis=(1, 2)) / total for n in _HARMONICS], axis=1)
    reach = np.asarray(
        [np.quantile(distance[cover > 0.5], 0.995) for distance, cover in zip(squared, coverage, strict=True)]
    )
    return Track(x=x, y=y, area=area, fill=area / (math.pi * reach), harmonics=harmonics)


def classify_colour(pixels: NDArray[np.uint8]) -> tuple[str | None, float]:
    """The commonest colour name among pixels [N, 3], and the share of them that bear it."""
    if pixels.shape[0] == 0:
        return None, 0.0
    values = pixels.astype(np.float64)
    high, low = values.max(axis=1), values.min(axis=1)
    saturation = (high - low) / np.maximum(high, 1)
    names = [name for name in COLOURS if name != "white"]
    hues = np.asarray([_hue(np.asarray([COLOURS[name]], dtype=np.float64))[0] for name in names])
    apart = np.abs((_hue(values)[:, None] - hues[None, :] + 180) % 360 - 180)
    nearest = np.where(saturation < _WHITE_SATURATION, len(names), apart.argmin(axis=1))
    counts = np.bincount(nearest, minlength=len(names) + 1)
    best = int(counts.argmax())
    return [*names, "white"][best], float(counts[best] / counts.sum())


def _hue(values: Floats) -> Floats:
    """Hue in degrees of colours [N, 3], on the hexagon's circle."""
    red, green, blue = values[:, 0], values[:, 1], values[:, 2]
    hue: Floats = np.degrees(np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    return hue


def classify_shape(track: Track) -> Shape:
    """The shape whose outline features (how much of its circle it fills, its symmetries) are nearest."""
    features = _features(track)
    distances = {shape: min(_apart(features, known) for known in _prototypes(shape)) for shape in Shape}
    return min(distances, key=lambda shape: distances[shape])


def _features(track: Track) -> Floats:
    return np.concatenate([[np.median(track.fill)], np.median(np.abs(track.harmonics[:, 1:]), axis=0) * 1.5])


def _apart(left: Floats, right: Floats) -> float:
    return float(np.abs(left - right).sum())


@functools.cache
def _prototypes(shape: Shape) -> tuple[Floats, ...]:
    found = []
    for action in (Action.GROW, Action.SPIN):
        spec = ClipSpec(Subject("white", shape, action), 96, 96, 16, 48.0, 48.0, 22.0, 9.0, 0, 1.0)
        coverage = np.clip((draw(spec).max(axis=-1).astype(np.float64) - _DARK) / (_LIT - _DARK), 0, 1)
        found.append(_features(follow(coverage)))
    return tuple(found)


def classify_action(track: Track, shape: Shape, width: int, height: int) -> Action | None:
    """The action that the track shows, by its most telling trend; None for an object at rest."""
    growth = _ends_ratio(np.sqrt(track.area))
    if growth >= _LEAST_GROWTH or growth <= 1 / _LEAST_GROWTH:
        return Action.GROW if growth > 1 else Action.SHRINK
    across, down = _ends(track.x) / width, _ends(track.y) / height
    if max(abs(across), abs(down)) >= _LEAST_MOVE:
        if abs(across) >= abs(down):
            return Action.RIGHT if across > 0 else Action.LEFT
        return Action.DOWN if down > 0 else Action.UP
    if _hops(track.y)[0] >= _LEAST_HOP * min(width, height):
        return Action.BOUNCE
    return Action.SPIN if abs(_ends(_angle(track, shape))) >= _LEAST_TURN_DEGREES else None


def _smoothness(track: Track, shape: Shape, action: Action | None, scale: float) -> tuple[float, bool]:
    """(residual of the action's ideal course, whether everything stays within the limits)."""
    if action is None:
        return math.inf, False
    steady = track.area.std() / track.area.mean() < _LIMIT_AREA_VARIATION
    on_course = _drift(track, action) < _LIMIT_DRIFT_PX * scale
    if action in MOVES:
        residual = math.hypot(_residual(track.x), _residual(track.y))
        jumps = max(_roughest_step(track.x), _roughest_step(track.y))
        smooth = steady and jumps < _LIMIT_STEP_PX * scale and residual < _LIMIT_RESIDUAL_PX * scale
        return residual, bool(smooth and on_course)
    if action is Action.BOUNCE:
        residual = _hops(track.y)[1]
        return residual, bool(steady and on_course and residual < _LIMIT_RESIDUAL_PX * scale)
    if action is Action.SPIN:
        residual = _residual(_angle(track, shape))
        return residual, bool(steady and on_course and residual < _LIMIT_TURN_RESIDUAL_DEGREES)
    size = np.sqrt(track.area)
    residual = _residual(size) / float(size.mean())
    return residual, bool(on_course and residual < _LIMIT_GROWTH_RESIDUAL)


def _drift(track: Track, action: Action | None) -> float:
    """How far the centroid strays in the directions that the action leaves alone, in pixels."""
    strays = []
    if action not in (Action.LEFT, Action.RIGHT):
        strays.append(float(np.ptp(track.x)))
    if action not in (Action.UP, Action.DOWN, Action.BOUNCE):
        strays.append(float(np.ptp(track.y)))
    return max(strays)


def _line(values: Floats) -> Floats:
    time = np.arange(len(values))
    return np.polyval(np.polyfit(time, values, 1), time).astype(np.float64)


def _residual(values: Floats) -> float:
    """Root mean square distance from the straight line through the values."""
    return float(np.sqrt(np.mean((values - _line(values)) ** 2)))


def _roughest_step(values: Floats) -> float:
    """The largest difference between one frame's step and the mean step."""
    steps = np.diff(values)
    return float(np.abs(steps - steps.mean()).max())


def _ends(values: Floats) -> float:
    line = _line(values)
    return float(line[-1] - line[0])


def _ends_ratio(values: Floats) -> float:
    line = np.maximum(_line(values), 1e-3)
    return float(line[-1] / line[0])


def _hops(y: Floats) -> tuple[float, float]:
    """(height of the hops, root mean square distance from them) of the best fit of bouncing, in pixels."""
    arcs = np.abs(np.sin(math.pi * BOUNCES * np.arange(len(y)) / len(y)))
    height, floor = np.polyfit(arcs, y, 1)
    return float(-height), float(np.sqrt(np.mean((y - floor - height * arcs) ** 2)))


def _angle(track: Track, shape: Shape) -> Floats:
    """The object's direction over time in degrees, from the symmetry of its shape, without wrap-around."""
    fold = _SYMMETRY[shape]
    phase = np.unwrap(np.angle(track.harmonics[:, _HARMONICS.index(fold)]))
    degrees: Floats = np.degrees(phase) / fold
    return degrees
