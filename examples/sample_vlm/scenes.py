"""Synthetic scenes: the world that the sample model knows. What is asked about them: `questions.py`.

A scene holds one to four coloured shapes on a plain background, and sometimes a number or a word.
It is a pure function of a split name and an index, so that every set can be made again, bit for
bit, on any machine with the same Pillow. Needs numpy and Pillow only.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 256
"""Edge of a rendered scene in pixels."""

GRID = 16
"""Patches per side that `patch_labels` describes; a patch is 16 x 16 pixels of the picture."""

KINDS = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 225, 50),
    "green": (40, 165, 70),
    "blue": (45, 85, 225),
    "purple": (135, 50, 185),
    "pink": (250, 140, 190),
    "white": (245, 245, 245),
}
# fmt: off
WORDS = (
    "OPEN", "STOP", "EXIT", "CAFE", "TAXI", "BANK", "PARK", "SHOP",
    "HOME", "FOOD", "MENU", "HELP", "PUSH", "PULL", "WIFI", "SALE",
    "BUS", "ZOO", "GYM", "PUB", "TEA", "ICE", "HOT", "FREE",
    "LIFT", "GATE", "FIRE", "KEYS", "RING", "MILK", "JUMP", "VOTE",
)
# fmt: on
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

MARGIN = 16
"""Least distance in pixels between two centres along an axis for an order along it to be asked."""


@dataclass(frozen=True)
class Style:
    """Ranges that scenes of one kind are drawn from."""

    shape_weights: tuple[float, float, float, float] = (0.2, 0.25, 0.3, 0.25)
    """Probability of one, two, three and four shapes."""
    digit_weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    """Probability of two, three and four digits in a number."""
    number: float = 1 / 3
    word: float = 1 / 6
    contrast: tuple[float, float] = (1.0, 1.0)
    """Factor on the distance of every pixel from mid-grey."""
    noise: tuple[float, float] = (0.0, 8.0)
    """Standard deviation, in grey levels, of noise with a grain of two pixels."""


CLEAN = Style()
HARD = Style(
    shape_weights=(0.0, 0.0, 0.0, 1.0),
    digit_weights=(0.0, 0.0, 1.0),
    number=2 / 3,
    word=1 / 6,
    contrast=(0.55, 0.55),
    noise=(22.0, 22.0),
)
ROUGH = Style(
    shape_weights=(0.05, 0.15, 0.25, 0.55),
    digit_weights=(0.15, 0.2, 0.65),
    number=0.55,
    word=0.25,
    contrast=(0.45, 1.0),
    noise=(0.0, 26.0),
)

SPLITS = {"train": 1, "clean": 2, "hard": 3, "example": 4}
"""First word of the seed of each set: no two sets share a seed."""


@dataclass(frozen=True)
class Shape:
    """One shape; centre, radius in pixels, angle in radians."""

    kind: str
    colour: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Text:
    """A number or a word; left, top and font size in pixels."""

    kind: str
    value: str
    rgb: tuple[int, int, int]
    left: float
    top: float
    font_size: int


@dataclass(frozen=True)
class Backdrop:
    """`kind` is flat, gradient or blocks; `angle` (radians) is of a gradient, `cells` of blocks."""

    kind: str
    rgb: tuple[int, int, int]
    other: tuple[int, int, int]
    angle: float
    cells: int


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture; `shapes` run from left to right."""

    shapes: tuple[Shape, ...]
    text: Text | None
    backdrop: Backdrop
    contrast: float
    noise: float
    seed: int


# --------------------------------------------------------------------------------------- geometry


def _star_points() -> list[tuple[float, float]]:
    turns = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
    radii = [1.08 if i % 2 == 0 else 0.46 for i in range(10)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


def _heart_points() -> list[tuple[float, float]]:
    points = []
    for i in range(36):
        t = 2 * math.pi * i / 36
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16.5, -(y + 2.5) / 16.5))
    return points


def _regular_points(corners: int, radius: float) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
    return [(radius * math.cos(t), radius * math.sin(t)) for t in turns]


def _cross_points() -> list[tuple[float, float]]:
    a, b = 0.32, 0.98
    quarter = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
    return quarter + [(-x, -y) for x, y in quarter]


_OUTLINES = {
    "circle": np.array(_regular_points(48, 0.92)),
    "square": np.array(_regular_points(4, 1.15)),
    "triangle": np.array(_regular_points(3, 1.12)),
    "star": np.array(_star_points()),
    "cross": np.array(_cross_points()),
    "heart": np.array(_heart_points()),
}


def outline(shape: Shape) -> list[tuple[float, float]]:
    """Corners of a shape in pixels."""
    c, s = math.cos(shape.angle), math.sin(shape.angle)
    points = _OUTLINES[shape.kind] @ np.array([[c, s], [-s, c]]) * shape.radius
    return [(float(x) + shape.x, float(y) + shape.y) for x, y in points]


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("scenes need a Pillow built with FreeType, as every wheel on PyPI is")
    return font


def text_boxes(text: Text) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of every character in pixels."""
    font = _font(text.font_size)
    _, top, _, bottom = font.getbbox(text.value)
    edges = [text.left + font.getlength(text.value[:i]) for i in range(len(text.value) + 1)]
    rows = (text.top + top, text.top + bottom)
    return [(a, rows[0], b, rows[1]) for a, b in itertools.pairwise(edges)]


def _text_area(text: Text) -> tuple[float, float, float, float]:
    boxes = text_boxes(text)
    return boxes[0][0], boxes[0][1], boxes[-1][2], boxes[0][3]


# --------------------------------------------------------------------------------------- sampling


def pick(rng: np.random.Generator, options: list[str] | tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _jitter(rng: np.random.Generator, rgb: tuple[int, ...], spread: int) -> tuple[int, int, int]:
    moved = np.clip(np.array(rgb) + rng.integers(-spread, spread + 1, 3), 0, 255)
    return int(moved[0]), int(moved[1]), int(moved[2])


def _names(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Distinct (kind, colour) pairs; often several of one kind or colour, so that counts vary."""
    leading_kind = pick(rng, KINDS) if rng.random() < 0.4 else None
    leading_colour = pick(rng, tuple(COLOURS)) if rng.random() < 0.2 else None
    names: list[tuple[str, str]] = []
    while len(names) < count:
        kind = leading_kind if leading_kind and rng.random() < 0.65 else pick(rng, KINDS)
        lead = leading_colour and rng.random() < 0.6
        colour = leading_colour if leading_colour and lead else pick(rng, tuple(COLOURS))
        if (kind, colour) not in names:
            names.append((kind, colour))
    return names


def _backdrop(rng: np.random.Generator, colours: list[tuple[int, int, int]]) -> Backdrop:
    """A dull colour that stays away from the colours of all shapes."""
    shapes = np.array(colours, dtype=np.float64)
    best, best_distance = (90, 90, 90), -1.0
    for _ in range(12):
        grey = int(rng.integers(25, 155))
        rgb = _jitter(rng, (grey, grey, grey), 16)
        distance = float(np.sqrt(((shapes - np.array(rgb)) ** 2).sum(1)).min())
        if distance > best_distance:
            best, best_distance = rgb, distance
        if distance >= 105:
            break
    kind = pick(rng, ("flat", "gradient", "blocks"))
    other = _jitter(rng, best, 26)
    return Backdrop(kind, best, other, float(rng.uniform(0, 2 * math.pi)), int(rng.integers(4, 13)))


def _text(rng: np.random.Generator, style: Style, dark: bool) -> Text | None:
    draw = rng.random()
    if draw < style.number:
        kind = "number"
        digits = 2 + int(rng.choice(3, p=style.digit_weights))
        value = str(rng.integers(10 ** (digits - 1), 10**digits))
    elif draw < style.number + style.word:
        kind, value = "word", pick(rng, WORDS)
    else:
        return None
    size = int(rng.integers(38, 50))
    rgb = _jitter(rng, (245, 245, 245), 10) if dark else _jitter(rng, (12, 12, 12), 10)
    at_origin = Text(kind, value, rgb, 0.0, 0.0, size)
    left, top, right, bottom = _text_area(at_origin)
    x = float(rng.uniform(6 - left, SIZE - 6 - right))
    y = float(rng.uniform(6 - top, SIZE - 6 - bottom))
    return Text(kind, value, rgb, x, y, size)


def _fits(x: float, y: float, r: float, placed: list[tuple[float, float, float]]) -> bool:
    apart = (math.hypot(x - px, y - py) >= 1.05 * (r + pr) + 4 for px, py, pr in placed)
    return all(apart) and all(abs(x - px) >= MARGIN for px, _, _ in placed)


def _clears(x: float, y: float, r: float, area: tuple[float, float, float, float] | None) -> bool:
    if area is None:
        return True
    dx = max(area[0] - x, 0.0, x - area[2])
    dy = max(area[1] - y, 0.0, y - area[3])
    return math.hypot(dx, dy) >= 1.08 * r + 3


def _place(
    rng: np.random.Generator, count: int, area: tuple[float, float, float, float] | None
) -> list[tuple[float, float, float]] | None:
    """Centres and radii without overlap, or None when this try found no room."""
    largest = 44 if count <= 2 else 38 if area is None else 34
    placed: list[tuple[float, float, float]] = []
    for _ in range(60):
        r = float(rng.uniform(22, largest))
        x, y = rng.uniform(1.15 * r + 2, SIZE - 1.15 * r - 2, 2).tolist()
        if _fits(x, y, r, placed) and _clears(x, y, r, area):
            placed.append((x, y, r))
            if len(placed) == count:
                return placed
    return None


def _sample(rng: np.random.Generator, style: Style) -> Scene:
    count = 1 + int(rng.choice(4, p=style.shape_weights))
    names = _names(rng, count)
    colours = [_jitter(rng, COLOURS[colour], 10) for _, colour in names]
    backdrop = _backdrop(rng, colours)
    luma = sum(backdrop.rgb) / 3
    spots = None
    while spots is None:
        text = _text(rng, style, dark=luma < 105)
        spots = _place(rng, count, _text_area(text) if text else None)
    shapes = [
        Shape(kind, colour, rgb, x, y, r, float(rng.uniform(0, 2 * math.pi)))
        for (kind, colour), rgb, (x, y, r) in zip(names, colours, spots, strict=True)
    ]
    shapes.sort(key=lambda shape: shape.x)
    contrast, noise = float(rng.uniform(*style.contrast)), float(rng.uniform(*style.noise))
    return Scene(tuple(shapes), text, backdrop, contrast, noise, int(rng.integers(2**31)))


def make_scene(split: str, index: int) -> Scene:
    """Scene `index` of a split: train, clean, hard or example."""
    rng = np.random.default_rng([SPLITS[split], index])
    if split == "train":
        return _sample(rng, CLEAN if rng.random() < 0.5 else ROUGH)
    return _sample(rng, HARD if split == "hard" else CLEAN)


# -------------------------------------------------------------------------------------- rendering


def _paint_backdrop(backdrop: Backdrop, rng: np.random.Generator) -> Image.Image:
    first, other = np.array(backdrop.rgb, np.float32), np.array(backdrop.other, np.float32)
    if backdrop.kind == "gradient":
        axis = np.linspace(-0.5, 0.5, 32, dtype=np.float32)
        ramp = math.cos(backdrop.angle) * axis[None, :] + math.sin(backdrop.angle) * axis[:, None]
        mix: np.ndarray = np.clip(ramp + 0.5, 0, 1)[..., None]
        small = first * (1 - mix) + other * mix
        image = Image.fromarray(small.astype(np.uint8))
        return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if backdrop.kind == "blocks":
        mix = rng.random((backdrop.cells, backdrop.cells, 1), dtype=np.float32)
        small = first * (1 - mix) + other * mix
        image = Image.fromarray(small.astype(np.uint8))
        return image.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return Image.new("RGB", (SIZE, SIZE), backdrop.rgb)


def _degrade(image: Image.Image, scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Contrast about mid-grey, then noise whose grain of two pixels survives a halving in size."""
    if scene.contrast == 1.0 and scene.noise == 0.0:
        return image
    half = SIZE // 2
    noise = rng.standard_normal((half, 1, half, 1, 3), dtype=np.float32) * scene.noise
    pixels = np.asarray(image, dtype=np.float32).reshape(half, 2, half, 2, 3)
    pixels = (pixels - 127.5) * scene.contrast + (127.5 + 0.5) + noise
    out = np.clip(pixels, 0, 255).astype(np.uint8)
    return Image.fromarray(out.reshape(SIZE, SIZE, 3))


def render(scene: Scene) -> Image.Image:
    """The picture: RGB, 256 x 256."""
    rng = np.random.default_rng(scene.seed)
    image = _paint_backdrop(scene.backdrop, rng)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        draw.polygon(outline(shape), fill=shape.rgb)
    if scene.text:
        text = scene.text
        position = (text.left, text.top)
        draw.text(position, text.value, fill=text.rgb, font=_font(text.font_size))
    return _degrade(image, scene, rng)


def patch_labels(scene: Scene) -> np.ndarray:
    """Class ids uint8[3, GRID * GRID] of kind, colour and character per patch; 0 is nothing."""
    scale = SIZE // GRID
    objects = Image.new("L", (GRID, GRID))
    draw = ImageDraw.Draw(objects)
    for i, shape in enumerate(scene.shapes, start=1):
        draw.polygon([(x / scale - 0.5, y / scale - 0.5) for x, y in outline(shape)], fill=i)
    colours = list(COLOURS)
    kinds = [0] + [KINDS.index(shape.kind) + 1 for shape in scene.shapes]
    shades = [0] + [colours.index(shape.colour) + 1 for shape in scene.shapes]
    index = np.asarray(objects).reshape(-1)
    labels = np.zeros((3, GRID * GRID), np.uint8)
    labels[0], labels[1] = np.array(kinds)[index], np.array(shades)[index]
    characters = labels[2].reshape(GRID, GRID)
    centres = (np.arange(GRID) + 0.5) * scale
    if scene.text:
        for character, box in zip(scene.text.value, text_boxes(scene.text), strict=True):
            columns = (centres >= box[0]) & (centres < box[2])
            rows = (centres >= box[1] - scale / 4) & (centres < box[3] + scale / 4)
            characters[np.ix_(rows, columns)] = CHARACTERS.index(character) + 1
    return labels
