"""Says what a picture of the demo's world shows, so that a model's pictures can be counted.

A judge of its own: of the training code it shares nothing but the world's outlines and colours.
Figures are told from the ground by their distance in CIELAB, and named by the nearest colour and
by the outline that overlaps them best; the subject is found by normalised cross-correlation.
"""

import functools
from typing import Any, NamedTuple

import demo_subject as subject
import demo_world as world
import numpy as np
from scipy import ndimage
from skimage.color import rgb2lab

Picture = np.ndarray
"""uint8 [h, w, 3]."""

SMOOTHING = 0.8
"""Standard deviation in pixels of the Gaussian that calms noise before colours are compared."""

BORDER = 4
"""Width in pixels of the edge that shows the ground; the world's figures keep off it."""

MIN_CORE, MIN_AREA = 30, 110
"""Pixels of a figure without and with its rim; the world's smallest, a star, has 300. Less is a
speck, or the mixed colours along an edge."""

SAME_COLOUR = 20.0
"""Distance in CIELAB up to which two parts have one colour; the palette's nearest are 28 apart."""

GRID, REACH = 32, 2.3
"""Side of the square that outlines are compared in, in cells; and half of it, in units of the
figure's root mean square radius."""

TURNS = np.linspace(-0.4, 0.4, 9)
"""Radians; the world turns figures by up to 0.15."""

MIN_OVERLAP = 0.75
"""Intersection over union from which on a figure is taken for a shape."""

SUBJECT_RADII = range(30, 50, 2)
"""Pixels; `demo_subject` draws them from 38 to 45."""

SUBJECT_MARGIN = 12
"""Pixels by which the subject may stick out of the picture."""

MIN_LIKENESS = 0.7
"""Correlation from which on something has the subject's form; the base world stays below 0.5."""

SUBJECT_PARTS = (
    *(
        (0.0, y, 0.14, 0.14, colour)
        for y, colour in ((-0.6, "red"), (0.0, "yellow"), (0.6, "green"))
    ),
    *((side, y, 0.05, 0.25, "black") for side in (-0.37, 0.37) for y in (-0.6, 0.0, 0.6)),
)
"""Middle, half width and half height in the subject's units, and colour: the lights, and the box
beside each."""

LOOSELY = 38.0
"""Distance in CIELAB up to which a part has its colour: narrow ones mix with their neighbours."""


class Seen(NamedTuple):
    """A figure in a picture: centre and circumscribed radius in pixels, overlap 0 … 1."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    score: float


class Found(NamedTuple):
    """The subject in a picture: correlation -1 … 1; middle and radius in pixels."""

    likeness: float
    x: float
    y: float
    radius: float


class Ground(NamedTuple):
    """A background: its colour, and its two tones in the picture's CIELAB."""

    colour: str
    tones: np.ndarray
    """float [2, 3]; a plain background has the first alone."""


class Outline(NamedTuple):
    """A mask moved to the middle of a grid and scaled to one mean radius."""

    cells: np.ndarray
    """bool [GRID, GRID]."""
    x: float
    y: float
    """Centre of mass in pixels."""
    spread: float
    """Root mean square distance from there, in pixels."""


def figures(picture: Picture) -> list[Seen]:
    """The figures, the largest first; what resembles no shape has a low score."""
    lab = _lab(picture)
    seen = [_recognise(mask, colour) for mask, colour in _areas(lab, _ground(lab))]
    return sorted(seen, key=lambda figure: -figure.radius)


def background(picture: Picture) -> str:
    """The background's colour, of whichever pattern."""
    return _ground(_lab(picture)).colour


def shows(picture: Picture, scene: world.Scene) -> bool:
    """Whether the picture shows the scene's figures, shape and colour, and no others."""
    return _agree(figures(picture), scene)


def relation_holds(picture: Picture, scene: world.Scene) -> bool:
    """Whether the picture shows the scene's two figures, and the first clearly where it should be.

    That is: the centres are further apart in that direction than either figure's radius.
    """
    seen = figures(picture)
    if not _agree(seen, scene):
        return False
    by_name = {(figure.shape, figure.colour): figure for figure in seen}
    first, second = (by_name[figure.shape, figure.colour] for figure in scene.figures)
    right, down = first.x - second.x, first.y - second.y
    offsets = {"left of": -right, "right of": right, "above": -down, "below": down}
    return offsets[scene.relation] > max(first.radius, second.radius)


def _agree(seen: list[Seen], scene: world.Scene) -> bool:
    wanted = sorted((figure.shape, figure.colour) for figure in scene.figures)
    found = sorted((figure.shape, figure.colour) for figure in seen)
    return found == wanted and all(figure.score >= MIN_OVERLAP for figure in seen)


def shows_subject(picture: Picture) -> bool:
    """Whether the picture shows the traffic light of `demo_subject`: form and colours."""
    found = find_subject(picture)
    if found.likeness < MIN_LIKENESS:
        return False
    lab, right = _lab(picture), 0
    for x, y, width, height, colour in SUBJECT_PARTS:
        left, top = found.x + (x - width) * found.radius, found.y + (y - height) * found.radius
        low = np.maximum(np.round([top, left]).astype(int), 0)
        high = low + np.maximum(np.round(2 * found.radius * np.array([height, width])), 1)
        part = lab[tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))]
        if part.size:
            distance = np.linalg.norm(np.median(part, axis=(0, 1)) - _palette()[colour][0])
            right += int(distance < LOOSELY)
    return right == len(SUBJECT_PARTS)


def find_subject(picture: Picture) -> Found:
    """Where the picture is most like the subject, of all places and sizes.

    The correlation is of all the subject's pixels and channels at half resolution, each channel's
    mean taken off.
    """
    half = picture.shape[0] // 2, picture.shape[1] // 2
    small = picture[: half[0] * 2, : half[1] * 2].reshape(half[0], 2, half[1], 2, 3).mean((1, 3))
    margin = SUBJECT_MARGIN // 2
    small = np.pad(small, ((margin, margin), (margin, margin), (0, 0)), "edge") / 255
    shape = small.shape[:2]
    squares = np.fft.rfft2((small**2).sum(-1))
    channels = np.fft.rfft2(small, axes=(0, 1))
    best = Found(-1.0, 0.0, 0.0, 0.0)
    for radius in SUBJECT_RADII:
        template = _template(radius, shape)
        if template is None:
            continue
        products = np.fft.irfft2((channels * template.contrast).sum(-1), shape)
        sums = np.fft.irfft2(channels * template.mask[..., None], shape, axes=(0, 1))
        energy = np.fft.irfft2(squares * template.mask, shape) - (sums**2).sum(-1) / template.area
        correlation = products / np.sqrt(np.maximum(energy, 1e-3 * template.area) * template.energy)
        inside = correlation[
            tuple(slice(n - m + 1) for n, m in zip(shape, template.size, strict=True))
        ]
        y, x = np.unravel_index(inside.argmax(), inside.shape)
        y, x = (2 * at + size - 2 * margin for at, size in zip((y, x), template.size, strict=True))
        best = max(best, Found(float(inside.max()), float(x), float(y), float(radius)))
    return best


def _lab(picture: Picture) -> np.ndarray:
    """The smoothed picture in CIELAB, float64 [h, w, 3]."""
    smooth = ndimage.gaussian_filter(picture.astype(np.float64), (SMOOTHING, SMOOTHING, 0))
    return rgb2lab(smooth / 255)


@functools.cache
def _palette() -> dict[str, np.ndarray]:
    """Each colour of the world and its second tone in CIELAB, [2, 3]."""
    pairs = {name: np.stack([rgb, world.shade(rgb)]) for name, rgb in world.COLOURS.items()}
    return {name: rgb2lab(pair / 255) for name, pair in pairs.items()}


def _to_segment(lab: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """From the nearest colour between two tones [2, 3] to each of `lab` [..., 3]: differences."""
    along = ends[1] - ends[0]
    share = np.clip((lab - ends[0]) @ along / (along @ along), 0, 1)
    return lab - (ends[0] + share[..., None] * along)


def _ground(lab: np.ndarray) -> Ground:
    """The colour between whose tones most of the border lies; tones shifted to fit the picture."""
    inner = np.zeros(lab.shape[:2], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    border = lab[~inner]
    offsets = {name: _to_segment(border, tones) for name, tones in _palette().items()}
    distances = {name: np.linalg.norm(offset, axis=-1) for name, offset in offsets.items()}
    colour = min(distances, key=lambda name: np.minimum(distances[name], 30).mean())
    nearby = offsets[colour][distances[colour] < 30]
    shift = np.median(nearby, axis=0) if len(nearby) else np.zeros(3)
    return Ground(colour, _palette()[colour] + shift)


def _areas(lab: np.ndarray, ground: Ground) -> list[tuple[np.ndarray, str]]:
    """Connected areas of one colour that are not the ground: masks [h, w], and colours' names.

    First which colours there are: those with areas wider than an edge's mixed colours. Then each
    pixel goes to the nearest of them, as they look in this picture, or to the ground.
    """
    from_ground = np.linalg.norm(_to_segment(lab, ground.tones), axis=-1)
    names = [name for name in _palette() if name != ground.colour]
    tones = np.stack([_palette()[name][0] for name in names])
    nearest = _nearest(lab, from_ground, tones)
    found: list[tuple[int, str, np.ndarray]] = []
    for index, name in enumerate(names, 1):
        core = _core(nearest == index)
        if (size := int(core.sum())) >= MIN_CORE:
            found.append((size, name, np.median(lab[core], axis=0)))
    kept: list[tuple[str, np.ndarray]] = []
    for _, name, tone in sorted(found, key=lambda entry: -entry[0]):
        if all(np.linalg.norm(tone - other) > SAME_COLOUR for _, other in kept):
            kept.append((name, tone))
    if not kept:
        return []
    nearest = _nearest(lab, from_ground, np.stack([tone for _, tone in kept]))
    return [
        (mask, name)
        for index, (name, _) in enumerate(kept, 1)
        for mask in _connected(nearest == index)
    ]


def _nearest(lab: np.ndarray, from_ground: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """For each pixel [h, w] the nearest of n tones [n, 3], counted from 1; 0 is the ground."""
    distances = [np.linalg.norm(lab - tone, axis=-1) for tone in tones]
    return np.argmin([from_ground, *distances], axis=0)


def _connected(mask: np.ndarray) -> list[np.ndarray]:
    """The mask's connected parts, [h, w] each, without specks and thin lines."""
    labelled: Any = ndimage.label(ndimage.median_filter(mask, 3))
    labels, count = labelled
    parts = [labels == index for index in range(1, count + 1)]
    return [part for part in parts if part.sum() >= MIN_AREA and _core(part).sum() >= MIN_CORE]


def _core(mask: np.ndarray) -> np.ndarray:
    """The pixels whose eight neighbours belong to the mask too, bool [h, w]."""
    return np.asarray(ndimage.binary_erosion(mask, np.ones((3, 3))), bool)


def _recognise(mask: np.ndarray, colour: str) -> Seen:
    """The shape and turn whose outline overlaps the mask's best."""
    outline = _outline(mask)
    cells, templates = _templates()
    both = cells @ outline.cells.ravel().astype(np.float32)
    overlap = both / (cells.sum(1) + outline.cells.sum() - both)
    best = int(overlap.argmax())
    shape, unit = templates[best]
    radius = outline.spread / unit.spread
    # A pixel's middle lies half a pixel from its index.
    x, y = outline.x + 0.5 - radius * unit.x, outline.y + 0.5 - radius * unit.y
    return Seen(shape, colour, x, y, radius, float(overlap[best]))


def _outline(mask: np.ndarray) -> Outline:
    y, x = np.nonzero(mask)
    middle = np.array([y.mean(), x.mean()])
    spread = float(np.sqrt(y.var() + x.var()))
    steps = (np.arange(GRID) + 0.5) / (GRID / 2) - 1
    grid = np.stack(np.meshgrid(steps, steps, indexing="ij")) * REACH * spread
    places = grid + middle[:, None, None]
    cells = ndimage.map_coordinates(mask.astype(np.float32), places, order=1) > 0.5
    return Outline(cells, float(middle[1]), float(middle[0]), spread)


@functools.cache
def _templates() -> tuple[np.ndarray, list[tuple[str, Outline]]]:
    """Every shape in every turn: float32 [n, GRID²] of 0 and 1; and names, with lengths in radii.

    Centres of mass are counted from the middle of the circumscribed circle.
    """
    side, radius = 129, 56.0
    templates = []
    for shape in world.SHAPES:
        for turn in TURNS:
            figure = world.Figure(shape, "", side / 2, side / 2, radius, float(turn))
            outline = _outline(world.silhouette((side, side), figure) > 0.5)
            x, y = ((at - side // 2) / radius for at in (outline.x, outline.y))
            templates.append((shape, Outline(outline.cells, x, y, outline.spread / radius)))
    cells = np.stack([outline.cells.ravel() for _, outline in templates])
    return cells.astype(np.float32), templates


class Template(NamedTuple):
    """The subject to look for: conjugate Fourier transforms, padded to the picture's size."""

    mask: np.ndarray
    """Of where it is, [h, w/2 + 1]."""
    contrast: np.ndarray
    """Of its colours with each channel's mean taken off, [h, w/2 + 1, 3]."""
    area: float
    energy: float
    size: tuple[int, int]
    """Height and width in pixels."""


@functools.lru_cache(64)
def _template(radius: int, shape: tuple[int, int]) -> Template | None:
    """The subject at half that radius, for pictures of a shape (h, w); None if it is larger."""
    side = 2 * radius + 4
    white, black = (
        subject.paint((side, side), side / 2, side / 2, radius, world.Background(name, "plain"))
        for name in ("white", "black")
    )
    same: Any = np.all(np.abs(white.astype(int) - black) < 16, axis=-1)
    tight = np.ix_(same.any(1), same.any(0))
    size = tuple(length // 2 for length in same[tight].shape)
    if any(length > room for length, room in zip(size, shape, strict=True)):
        return None

    def halve(values: np.ndarray) -> np.ndarray:
        values = values[tight][: size[0] * 2, : size[1] * 2].astype(float)
        return values.reshape(size[0], 2, size[1], 2, -1).mean((1, 3))

    mask = halve(same)
    colours = halve(white * same[..., None]) / np.maximum(mask, 1e-6) / 255
    mask = (mask > 0.5).astype(float)
    contrast = mask * (colours - (mask * colours).sum((0, 1)) / mask.sum())
    return Template(
        np.conj(np.fft.rfft2(mask[..., 0], shape)),
        np.conj(np.fft.rfft2(contrast, shape, axes=(0, 1))),
        float(mask.sum()),
        float((contrast**2).sum()),
        (size[0], size[1]),
    )
