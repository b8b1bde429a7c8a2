"""Procedurally drawn clips: one coloured shape doing one thing on a dark, softly graded background.

They are the whole training set of the demo video model, and the yardstick of its measurement. Every clip is
described by a frozen :class:`ClipSpec`; drawing is a pure function of it, and every random choice comes from the
generator given by the caller. Edges are anti-aliased from signed distances in pixels.

The light on the background wanders from the top to the bottom. That is a clip's clock: STDiT3's temporal attention
knows how far frames are apart and not which is the first, so that without it nothing would tell where in a turn or in
a hop a frame belongs. A turning circle would look like a resting one, so circles do not spin.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
Plane = NDArray[np.float32]


class Shape(StrEnum):
    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    STAR = "star"


class Action(StrEnum):
    RIGHT = "right"
    LEFT = "left"
    UP = "up"
    DOWN = "down"
    GROW = "grow"
    SHRINK = "shrink"
    BOUNCE = "bounce"
    SPIN = "spin"


class Scale(StrEnum):
    SMALL = "small"
    NORMAL = "normal"
    BIG = "big"


COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 48, 48),
    "orange": (245, 140, 28),
    "yellow": (246, 220, 52),
    "green": (56, 186, 74),
    "cyan": (48, 208, 220),
    "blue": (58, 104, 236),
    "purple": (158, 70, 222),
    "white": (240, 240, 240),
}
BACKGROUNDS: tuple[tuple[int, int, int], ...] = ((40, 41, 46), (30, 36, 54), (28, 46, 48), (50, 40, 40))
SIZES: tuple[tuple[int, int], ...] = ((64, 64), (96, 64), (64, 96), (128, 128))
"""(width, height) in pixels."""
FRAME_COUNTS: tuple[int, ...] = (16, 32)
FPS = 8
MOVES: dict[Action, tuple[int, int]] = {
    Action.RIGHT: (1, 0),
    Action.LEFT: (-1, 0),
    Action.UP: (0, -1),
    Action.DOWN: (0, 1),
}
"""Unit vector of each straight movement, y pointing down."""

_LIGHT = 0.28
BOUNCES = 2
"""Hops in one clip, however long it is."""
SPIN_DEGREES_PER_FRAME = 6.0
RADIUS_OF_MIN_SIDE = {Scale.SMALL: 0.175, Scale.NORMAL: 0.22, Scale.BIG: 0.265}


@dataclass(frozen=True)
class Subject:
    """What the caption tells: the conditional part of a clip."""

    colour: str
    shape: Shape
    action: Action
    scale: Scale = Scale.NORMAL


@dataclass(frozen=True)
class ClipSpec:
    """A clip, completely: subject, format, and the free choices (positions and radius in pixels)."""

    subject: Subject
    width: int
    height: int
    frames: int
    centre_x: float
    centre_y: float
    radius: float
    travel: float
    background: int
    shade: float


def shapes_for(action: Action) -> list[Shape]:
    """The shapes that can be seen doing it."""
    return [shape for shape in Shape if (shape, action) != (Shape.CIRCLE, Action.SPIN)]


def sample_subject(rng: np.random.Generator) -> Subject:
    """A subject with every colour and action equally likely, and every shape that can do it."""
    action = list(Action)[rng.integers(len(Action))]
    scale = Scale.NORMAL
    if action not in (Action.GROW, Action.SHRINK) and rng.random() < 0.2:
        scale = Scale.SMALL if rng.random() < 0.5 else Scale.BIG
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    able = shapes_for(action)
    shape = able[rng.integers(len(able))]
    return Subject(colour=colour, shape=shape, action=action, scale=scale)


def sample_clip(rng: np.random.Generator, subject: Subject, width: int, height: int, frames: int) -> ClipSpec:
    """Choose place, radius and way of a clip so that the object never leaves the picture.

    Raises ``ValueError`` if the picture is under 48 pixels or the clip under 8 frames.
    """
    if min(width, height) < 48 or frames < 8:
        raise ValueError(f"a clip needs 48x48 pixels and 8 frames at least, not {width}x{height} and {frames}")
    side = min(width, height)
    radius = side * RADIUS_OF_MIN_SIDE[subject.scale] * rng.uniform(0.96, 1.04)
    reach = radius * (1.42 if subject.action is Action.GROW or subject.action is Action.SHRINK else 1.0)
    slack_x = width / 2 - reach - 2.0
    slack_y = height / 2 - reach - 2.0
    travel = 0.0
    if subject.action in MOVES:
        horizontal = MOVES[subject.action][0] != 0
        slack = slack_x if horizontal else slack_y
        wanted = (width if horizontal else height) * rng.uniform(0.37, 0.43)
        travel = min(wanted, 2 * slack)
        slack_x, slack_y = (slack - travel / 2, 0.5 * slack_y) if horizontal else (0.5 * slack_x, slack - travel / 2)
    elif subject.action is Action.BOUNCE:
        travel = min(side * rng.uniform(0.26, 0.32), 2 * slack_y)
        slack_x, slack_y = 0.5 * slack_x, min(slack_y - travel / 2, 0.08 * height)
    elif subject.action is Action.SPIN:
        travel = SPIN_DEGREES_PER_FRAME
        slack_x, slack_y = 0.4 * slack_x, 0.4 * slack_y
    else:
        slack_x, slack_y = 0.4 * slack_x, 0.4 * slack_y
    return ClipSpec(
        subject=subject,
        width=width,
        height=height,
        frames=frames,
        centre_x=width / 2 + max(slack_x, 0.0) * rng.uniform(-1, 1),
        centre_y=height / 2 + max(slack_y, 0.0) * rng.uniform(-1, 1),
        radius=radius,
        travel=travel,
        background=int(rng.integers(len(BACKGROUNDS))),
        shade=float(rng.uniform(0.97, 1.03)),
    )


@dataclass(frozen=True)
class Pose:
    """Where the object is in one frame: pixels and radians (positive turns clockwise on the screen)."""

    x: float
    y: float
    radius: float
    angle: float


def pose_at(spec: ClipSpec, frame: int) -> Pose:
    """The object's pose in a frame; straight movement, growth and turning are linear in time."""
    action, progress = spec.subject.action, frame / (spec.frames - 1)
    x, y, radius, angle = spec.centre_x, spec.centre_y, spec.radius, 0.0
    if action in MOVES:
        step_x, step_y = MOVES[action]
        x += step_x * spec.travel * (progress - 0.5)
        y += step_y * spec.travel * (progress - 0.5)
    elif action is Action.BOUNCE:
        y += spec.travel * (0.5 - abs(math.sin(math.pi * BOUNCES * frame / spec.frames)))
    elif action is Action.GROW:
        radius *= 0.65 + 0.75 * progress
    elif action is Action.SHRINK:
        radius *= 1.40 - 0.75 * progress
    else:
        angle = math.radians(spec.travel) * frame
    return Pose(x=x, y=y, radius=radius, angle=angle)


def draw(spec: ClipSpec) -> Frames:
    """Draw a clip as uint8 [frames, height, width, 3]."""
    tone = np.asarray(BACKGROUNDS[spec.background], dtype=np.float32)
    downwards = np.linspace(-1, 1, spec.height, dtype=np.float32)[None, :, None, None]
    onwards = np.linspace(-1, 1, spec.frames, dtype=np.float32)[:, None, None, None]
    light = 1 + _LIGHT * downwards * onwards
    background = np.broadcast_to(tone * light, (spec.frames, spec.height, spec.width, 3))
    colour = np.clip(np.asarray(COLOURS[spec.subject.colour], dtype=np.float32) * spec.shade, 0, 255)
    poses = [pose_at(spec, frame) for frame in range(spec.frames)]
    x, y, radius, angle = (
        np.asarray(column, dtype=np.float32)[:, None, None]
        for column in zip(*((p.x, p.y, p.radius, p.angle) for p in poses), strict=True)
    )
    across = np.arange(spec.width, dtype=np.float32)[None, None, :] + 0.5 - x
    down = np.arange(spec.height, dtype=np.float32)[None, :, None] + 0.5 - y
    if spec.subject.action is Action.SPIN:
        cosine, sine = np.cos(angle), np.sin(angle)
        across, down = across * cosine + down * sine, down * cosine - across * sine
    distance = _DISTANCES[spec.subject.shape](across, down, radius)
    coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    frames: Frames = (background + coverage * (colour - background) + 0.5).astype(np.uint8)
    return frames


def _circle_distance(x: Plane, y: Plane, radius: Plane) -> Plane:
    distance: Plane = np.sqrt(x * x + y * y) - radius
    return distance


def _square_distance(x: Plane, y: Plane, radius: Plane) -> Plane:
    distance: Plane = np.maximum(np.abs(x), np.abs(y)) - np.float32(0.84) * radius
    return distance


def _triangle_distance(x: Plane, y: Plane, radius: Plane) -> Plane:
    """Equilateral, a corner up: the largest distance beyond one of the three sides."""
    size = radius * np.float32(1.15)
    slope = np.float32(math.sqrt(3) / 2) * np.abs(x) - np.float32(0.5) * y
    distance: Plane = np.maximum(slope, y) - np.float32(0.5) * size
    return distance


def _star_distance(x: Plane, y: Plane, radius: Plane) -> Plane:
    """Five points, one of them up: the plane is folded onto one half of one point, then one edge remains."""
    size: Plane = radius * np.float32(1.25)
    across: Plane = np.abs(x)
    x, y = across, -y
    normal_x, normal_y = np.float32(math.cos(math.radians(36))), np.float32(-math.sin(math.radians(36)))
    for _ in range(2):  # each fold mirrors what lies more than 36 degrees off the vertical; two reach the lowest point
        beyond: Plane = np.maximum(x * normal_x + y * normal_y, np.float32(0)) * np.float32(2)
        folded: Plane = np.abs(x - beyond * normal_x)
        x, y = folded, y - beyond * normal_y
    corner_x, corner_y = 0.5 * math.sin(math.radians(36)), 0.5 * math.cos(math.radians(36))
    length = math.hypot(corner_x, 1 - corner_y)
    edge_x, edge_y = np.float32((1 - corner_y) / length), np.float32(corner_x / length)
    distance: Plane = x * edge_x + (y - size) * edge_y
    return distance


_DISTANCES = {
    Shape.CIRCLE: _circle_distance,
    Shape.SQUARE: _square_distance,
    Shape.TRIANGLE: _triangle_distance,
    Shape.STAR: _star_distance,
}
