"""The pictures that the demo model learns: coloured shapes, drawn and captioned.

A scene is one or two figures (shape, colour, size, place) on a plain or patterned background; its
caption is put together from a small grammar with synonyms. Everything follows from the generator
handed in, so the same seed draws the same pictures.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZES = ((128, 128), (160, 96), (96, 160))
"""Widths and heights in pixels; the first is the most frequent."""

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (252, 220, 50),
    "green": (40, 150, 70),
    "cyan": (80, 205, 225),
    "blue": (40, 80, 205),
    "purple": (125, 50, 165),
    "pink": (248, 150, 195),
    "white": (245, 245, 245),
    "black": (22, 22, 22),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
RADII = {"small": 20.0, "medium": 28.0, "large": 38.0}
"""Of a figure's circumscribed circle, in pixels."""

GRID = 8
"""Pixels of a latent: figures and patterns stand on this grid, so that the same figure always has
the same latents, and a small network soon knows them."""

SYNONYMS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus"),
    "crescent": ("crescent", "moon"),
    "purple": ("purple", "violet"),
    "small": ("small", "little"),
    "large": ("large", "big"),
    "plain": ("", "", "plain"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
CLASS = "figure"
"""What any shape may be called."""

OPENINGS = ("", "", "", "a picture of ", "a drawing of ")
BACKGROUNDS = ("on a {} background", "on a {} background", "against a {} background", "on {}")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Outline = np.ndarray
"""Corners of a polygon, float [n, 2], x to the right and y down, within the unit circle."""


def _circle(radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> Outline:
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], -1)


def _regular(corners: int, start: float, radii: Sequence[float] = (1.0,)) -> Outline:
    angle = start + np.arange(corners) * 2 * np.pi / corners
    radius = np.resize(radii, corners)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def _cross(arm: float = 0.33) -> Outline:
    long = np.sqrt(1 - arm**2)
    quarter = np.array([(arm, -long), (arm, -arm), (long, -arm)])
    turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _heart() -> Outline:
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2], -1) / 17


SHAPES: dict[str, tuple[Outline, Outline | None]] = {
    "circle": (_circle(), None),
    "square": (_regular(4, np.pi / 4), None),
    "triangle": (_regular(3, -np.pi / 2), None),
    "star": (_regular(10, -np.pi / 2, (1.0, 0.42)), None),
    "ring": (_circle(), _circle(0.55)),
    "cross": (_cross(), None),
    "heart": (_heart(), None),
    "crescent": (_circle(), _circle(0.85, 0.5)),
}
"""What is filled, and what is cut out of it."""


class Figure(NamedTuple):
    """One shape in a scene; `x`, `y`, `radius` in pixels, `turn` in radians."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float = 0.0


class Background(NamedTuple):
    """A colour and a pattern; `phase` in pixels and `angle` (quarter turns or diagonal) vary it."""

    colour: str
    pattern: str
    phase: tuple[float, float] = (0.0, 0.0)
    slope: tuple[float, float] = (1.0, 0.0)


class Scene(NamedTuple):
    """What one picture shows."""

    size: tuple[int, int]
    figures: tuple[Figure, ...]
    background: Background
    relation: str = ""
    """Of the first figure to the second: a key of `OPPOSITES`."""


def shade(rgb: tuple[int, int, int]) -> np.ndarray:
    """The second tone of a pattern: lighter where the colour is dark, else darker."""
    colour = np.array(rgb, np.float32)
    luma = colour @ np.array([0.299, 0.587, 0.114], np.float32)
    return colour * 0.8 + 255 * 0.2 if luma < 100 else colour * 0.8


def paint_background(size: tuple[int, int], background: Background) -> np.ndarray:
    """float32 [h, w, 3], 0 … 255; edges of the pattern are one pixel soft."""
    width, height = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x + background.phase[0], y + background.phase[1]
    if background.pattern == "striped":
        across = background.slope[0] * x + background.slope[1] * y
        distance = np.abs(across % 48 - 24) - 12
    elif background.pattern == "dotted":
        distance = 10 - np.hypot(x % 40 - 20, y % 40 - 20)
    elif background.pattern == "checkered":
        a, b = np.abs(x % 48 - 24) - 12, np.abs(y % 48 - 24) - 12
        distance = np.sign(a * b) * np.minimum(np.abs(a), np.abs(b))
    else:
        distance = np.full_like(x, -1.0)
    cover = np.clip(distance + 0.5, 0, 1)[..., None]
    base = COLOURS[background.colour]
    return (1 - cover) * np.array(base, np.float32) + cover * shade(base)


def silhouette(size: tuple[int, int], figure: Figure, supersampling: int = 4) -> np.ndarray:
    """How much of each pixel the figure covers: float32 [h, w], 0 … 1."""
    cos, sin = np.cos(figure.turn), np.sin(figure.turn)
    rotation = np.array([(cos, sin), (-sin, cos)])
    mask = Image.new("L", (size[0] * supersampling, size[1] * supersampling))
    draw = ImageDraw.Draw(mask)
    for outline, fill in zip(SHAPES[figure.shape], (255, 0), strict=True):
        if outline is not None:
            points = figure.radius * outline @ rotation + (figure.x, figure.y)
            draw.polygon([tuple(p) for p in points * supersampling], fill=fill)
    return np.asarray(mask.reduce(supersampling), np.float32) / 255


def paint(scene: Scene) -> np.ndarray:
    """The picture: uint8 [h, w, 3]."""
    canvas = paint_background(scene.size, scene.background)
    for figure in scene.figures:
        cover = silhouette(scene.size, figure)[..., None]
        canvas = (1 - cover) * canvas + cover * np.array(COLOURS[figure.colour], np.float32)
    return np.round(canvas).astype(np.uint8)


def held_out(scene: Scene) -> bool:
    """Whether the scene belongs to the tenth of all combinations that training never shows.

    A combination is a figure's shape and colour with the background's colour, or the shapes and
    colours of two figures.
    """
    names = sorted(f"{figure.colour} {figure.shape}" for figure in scene.figures)
    if len(names) == 1:
        names.append(scene.background.colour)
    return hashlib.sha256(" ".join(names).encode()).digest()[0] % 10 == 0


def random_scene(
    rng: np.random.Generator, size: tuple[int, int], figures: int, kept_out: bool = False
) -> Scene:
    """A scene of the training set, or of the combinations kept out of it."""
    while True:
        scene = _random_scene(rng, size, figures)
        if held_out(scene) == kept_out:
            return scene


def _random_scene(rng: np.random.Generator, size: tuple[int, int], figures: int) -> Scene:
    colours = [str(c) for c in rng.permutation(list(COLOURS))[: figures + 1]]
    slopes = [(1.0, 0.0), (0.0, 1.0), (0.75, 0.75), (0.75, -0.75)]  # repeat on the grid
    background = Background(
        colours.pop(),
        str(rng.choice(PATTERNS, p=[0.55, 0.15, 0.15, 0.15])),
        (float(GRID * rng.integers(30)), float(GRID * rng.integers(30))),
        slopes[rng.integers(4)],
    )
    if figures == 1:
        place = _radius(rng, list(RADII)), rng.uniform(0, 1, 2)
        return Scene(size, (_figure(rng, size, colours[0], *place),), background)
    relations = list(OPPOSITES)
    if size[0] != size[1]:  # side by side where the picture is wide, else one above the other
        relations = relations[:2] if size[0] > size[1] else relations[2:]
    relation = relations[rng.integers(len(relations))]
    first, second = rng.uniform(0, 0.08), rng.uniform(0.92, 1)
    if relation in ("right of", "below"):
        first, second = second, first
    places = [(first, rng.uniform(0.2, 0.8)), (second, rng.uniform(0.2, 0.8))]
    if relation in ("above", "below"):
        places = [place[::-1] for place in places]
    both = tuple(
        _figure(rng, size, colour, _radius(rng, ["small", "medium"]), np.array(place))
        for colour, place in zip(colours, places, strict=True)
    )
    return Scene(size, both, background, relation)


def _radius(rng: np.random.Generator, names: list[str]) -> float:
    return RADII[names[rng.integers(len(names))]]


def _figure(
    rng: np.random.Generator,
    size: tuple[int, int],
    colour: str,
    radius: float,
    place: np.ndarray,
) -> Figure:
    """A figure of a random shape; `place` 0 … 1 is from one margin to the other."""
    x, y = on_grid(place, np.array(size), np.full(2, radius + 4))
    shape = list(SHAPES)[rng.integers(len(SHAPES))]
    return Figure(shape, colour, x, y, radius)


def on_grid(place: np.ndarray, size: np.ndarray, margin: np.ndarray) -> tuple[float, float]:
    """The point of the grid nearest to a place, 0 … 1 from one margin to the other, within them."""
    first, last = np.ceil(margin / GRID), np.floor((size - margin) / GRID)
    x, y = GRID * np.round(first + place * (last - first))
    return float(x), float(y)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One way of saying what the scene shows; not all of it is always said."""

    def say(word: str) -> str:
        words = SYNONYMS.get(word, (word,))
        return words[rng.integers(len(words))]

    def name(figure: Figure) -> str:
        size = min(RADII, key=lambda size: abs(RADII[size] - figure.radius))
        size = say(size) if size != "medium" and rng.random() < 0.6 else ""
        shape = say(figure.shape) if rng.random() < 0.92 else CLASS
        text = " ".join(filter(None, [size, say(figure.colour), shape]))
        return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"

    text = OPENINGS[rng.integers(len(OPENINGS))] + name(scene.figures[0])
    if scene.relation:
        relation = "and" if rng.random() < 0.15 else say(scene.relation)
        text = f"{text} {relation} {name(scene.figures[1])}"
    if rng.random() < 0.1:
        return text
    background = scene.background
    words = " ".join(filter(None, [say(background.pattern), say(background.colour)]))
    phrase = BACKGROUNDS[rng.integers(len(BACKGROUNDS))].format(words)
    return f"{text} {phrase.replace('a orange', 'an orange')}"


def crowded_scene(rng: np.random.Generator, size: tuple[int, int], figures: int) -> Scene:
    """Figures all over each other: what no caption describes, but a decoder should paint."""
    colours, shapes = list(COLOURS), list(SHAPES)

    def figure() -> Figure:
        shape, colour = shapes[rng.integers(len(shapes))], colours[rng.integers(len(colours))]
        x, y = (float(place) for place in rng.uniform(0, 1, 2) * size)
        return Figure(shape, colour, x, y, float(rng.uniform(8, 45)), float(rng.uniform(0, 6.3)))

    many = tuple(figure() for _ in range(figures))
    return Scene(size, many, _random_scene(rng, size, 1).background)


def words() -> list[str]:
    """All words that captions are made of."""
    texts = [*COLOURS, *SHAPES, *RADII, *PATTERNS, *OPENINGS, *BACKGROUNDS, CLASS, "an", "and"]
    texts += [word for synonyms in SYNONYMS.values() for word in synonyms]
    return sorted({word for text in texts for word in text.replace("{}", "").split()})
