"""The judge of the demo: how often it is right, of pictures whose content is known."""

from collections.abc import Callable

import demo_subject as subject
import demo_world as world
import judge
import numpy as np
import pytest
from scipy import ndimage

Degrade = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def degraded(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred by 1 pixel, each channel shifted by up to 16 grey levels, noisy by 8."""
    blurred = ndimage.gaussian_filter(picture.astype(float), (1, 1, 0))
    noisy = blurred + rng.uniform(-16, 16, 3) + rng.normal(0, 8, picture.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def intact(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return picture


DEGREES = pytest.mark.parametrize(
    ("degrade", "share"), [(intact, 0.98), (degraded, 0.95)], ids=["intact", "degraded"]
)


def scenes(seed: int, count: int) -> list[world.Scene]:
    """Of combinations that training never shows: every size, one figure and two."""
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng, world.SIZES[i % 3], 1 + i // 3 % 2, True) for i in range(count)]


def misnamed(scene: world.Scene, rng: np.random.Generator) -> list[world.Scene]:
    """The scene with another shape, and with another colour, of its last figure."""
    *others, figure = scene.figures
    shapes, colours = (
        [name for name in names if name not in figure] for names in (world.SHAPES, world.COLOURS)
    )
    changed = (
        figure._replace(shape=shapes[rng.integers(len(shapes))]),
        figure._replace(colour=colours[rng.integers(len(colours))]),
    )
    return [scene._replace(figures=(*others, other)) for other in changed]


@DEGREES
def test_figures_are_named_rightly_and_nothing_else_is_accepted(degrade: Degrade, share: float):
    rng = np.random.default_rng(1)
    right, ground, accepted = [], [], []
    for scene in scenes(0, 72):
        picture = degrade(world.paint(scene), rng)
        right.append(judge.shows(picture, scene))
        ground.append(judge.background(picture) == scene.background.colour)
        accepted += [judge.shows(picture, other) for other in misnamed(scene, rng)]
    assert np.mean(right) >= share
    assert np.mean(ground) >= share
    assert np.mean(accepted) <= 0.01


@DEGREES
def test_a_figures_place_and_size_are_found(degrade: Degrade, share: float):
    rng = np.random.default_rng(2)
    for scene in scenes(3, 30):
        seen = {figure.colour: figure for figure in judge.figures(degrade(world.paint(scene), rng))}
        for figure in scene.figures:
            found = seen[figure.colour]
            # Where two figures touch, the mixed colours between them belong to neither.
            assert abs(found.x - figure.x) < 2.5
            assert abs(found.y - figure.y) < 2.5
            # The pattern's second tone may take part of the blurred edge for the background.
            assert found.radius == pytest.approx(figure.radius, rel=0.25)


@DEGREES
def test_a_relation_holds_and_its_opposite_does_not(degrade: Degrade, share: float):
    rng = np.random.default_rng(4)
    right, accepted = [], []
    for scene in [scene for scene in scenes(5, 48) if scene.relation]:
        picture = degrade(world.paint(scene), rng)
        right.append(judge.relation_holds(picture, scene))
        opposite = scene._replace(relation=world.OPPOSITES[scene.relation])
        accepted.append(judge.relation_holds(picture, opposite))
    assert np.mean(right) >= share
    assert not any(accepted)


def test_too_few_and_too_many_figures_are_told():
    both = next(scene for scene in scenes(6, 6) if len(scene.figures) == 2)
    one = both._replace(figures=both.figures[:1], relation="")
    none = both._replace(figures=(), relation="")
    assert not judge.shows(world.paint(both), one)
    assert not judge.shows(world.paint(one), both)
    assert judge.figures(world.paint(none)) == []
    speck = world.paint(one)
    speck[2:8, 2:8] = world.COLOURS[both.figures[1].colour]
    assert judge.shows(speck, one)


def test_noise_shows_nothing():
    rng = np.random.default_rng(7)
    for scene in scenes(8, 6):
        noise = rng.integers(0, 256, (128, 128, 3), np.uint8)
        assert not judge.shows(noise, scene)
        assert not judge.shows_subject(noise)


@DEGREES
def test_the_subject_is_recognised(degrade: Degrade, share: float):
    rng = np.random.default_rng(9)
    pictures = [subject.random_picture(rng, world.SIZES[i % 3])[0] for i in range(45)]
    assert np.mean([judge.shows_subject(degrade(picture, rng)) for picture in pictures]) >= 0.98


def test_the_base_world_does_not_show_the_subject():
    rng = np.random.default_rng(10)
    pictures = [world.paint(scene) for scene in scenes(11, 90)]
    pictures += [world.paint(world.crowded_scene(rng, world.SIZES[0], 6)) for _ in range(30)]
    assert np.mean([judge.shows_subject(picture) for picture in pictures]) < 0.01


def test_what_has_some_of_the_subject_is_not_the_subject(monkeypatch: pytest.MonkeyPatch):
    def figure(shape: str, colour: str, y: float, radius: float) -> world.Figure:
        return world.Figure(shape, colour, 64.0, y, radius)

    square, disc = figure("square", "black", 64, 50), figure("circle", "yellow", 64, 12)
    red, green = figure("circle", "red", 38, 12), figure("circle", "green", 90, 12)
    for figures in ((square,), (disc,), (square, disc), (red, disc, green)):
        for pattern in world.PATTERNS:
            ground = world.Background("blue", pattern, slope=(0.0, 1.0))
            picture = world.paint(world.Scene((128, 128), figures, ground))
            assert not judge.shows_subject(picture)

    plain = world.Background("blue", "plain")
    assert judge.shows_subject(subject.paint((128, 128), 64, 64, 40, plain))
    box, lights = subject.RECTANGLES, subject.DISCS
    swapped = tuple((disc, light[1]) for (disc, _), light in zip(lights, lights[::-1], strict=True))
    for rectangles, discs in ((box, swapped), (box, lights[:2]), (box, ()), ((), lights)):
        monkeypatch.setattr(subject, "RECTANGLES", rectangles)
        monkeypatch.setattr(subject, "DISCS", discs)
        assert not judge.shows_subject(subject.paint((128, 128), 64, 64, 40, plain))
