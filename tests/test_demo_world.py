"""The world of the demo, its subject, and the names under which they come with the package."""

from pathlib import Path

import demo_subject
import demo_world as world
import numpy as np
import pytest
from PIL import Image

from jaxft.builtin import names
from jaxft.data import source
from jaxft.errors import UserError
from jaxft.formats import layout
from tests.conftest import ROOT


@pytest.mark.parametrize("name", names.FOLDERS)
def test_builtin_names_lead_into_the_package(offline, name):
    assert names.resolve(f"builtin:{name}") == ROOT / "jaxft" / "builtin" / names.FOLDERS[name]
    assert names.resolve(f"builtin:{name}/") == ROOT / "jaxft" / "builtin" / names.FOLDERS[name]


def test_other_paths_stay_as_they_are():
    assert names.resolve("a/b") == Path("a/b")
    assert names.resolve(Path("/builtin")) == Path("/builtin")


@pytest.mark.parametrize("name", ["", "demo/subjects", "demo/../demo", "../names.py"])
def test_a_wrong_name_says_what_there_is(offline, name):
    for use in (layout.locate, source.index):
        with pytest.raises(UserError) as error:
            use(f"builtin:{name}")
        assert str(error.value).startswith(f"builtin:{name}: ")
        assert all(f"builtin:{known}" in str(error.value) for known in names.FOLDERS)


def test_the_subject_has_pictures_of_three_shapes_with_captions(offline, tmp_path):
    records = source.index("builtin:demo/subject", caption_file="builtin:demo/subject").records
    assert len(records) == demo_subject.NUM_PICTURES == 16
    assert {record.size for record in records} == set(world.SIZES)
    assert all(
        f"a {demo_subject.WORD} {world.CLASS} on" in record.captions[0] for record in records
    )
    demo_subject.write(tmp_path)
    for record in records:
        drawn = Image.open(tmp_path / record.path.name)
        np.testing.assert_array_equal(np.asarray(Image.open(record.path)), np.asarray(drawn))
        assert (tmp_path / f"{record.path.stem}.txt").read_text().strip() == record.captions[0]


SCENE = world.Scene(
    (128, 128),
    (world.Figure("star", "red", 60.0, 60.0, 25.0),),
    world.Background("blue", "striped"),
)


@pytest.mark.parametrize("size", world.SIZES)
@pytest.mark.parametrize("figures", [1, 2])
def test_the_same_seed_draws_the_same_picture(size, figures):
    def draw(seed: int) -> tuple[bytes, str]:
        rng = np.random.default_rng(seed)
        scene = world.random_scene(rng, size, figures)
        picture = world.paint(scene)
        assert picture.shape == (size[1], size[0], 3)
        return picture.tobytes(), world.caption(scene, rng)

    assert draw(1) == draw(1)
    assert draw(1)[0] != draw(2)[0]


@pytest.mark.parametrize("figures", [1, 2])
def test_held_out_combinations_are_never_trained_on(rng, figures):
    def combination(scene: world.Scene) -> frozenset[str]:
        named = {f"{figure.colour} {figure.shape}" for figure in scene.figures}
        return frozenset(named | ({scene.background.colour} if figures == 1 else set()))

    trained, kept_out = (
        {combination(world.random_scene(rng, (128, 128), figures, kept)) for _ in range(1000)}
        for kept in (False, True)
    )
    assert not trained & kept_out
    scenes = [world._random_scene(rng, (128, 128), figures) for _ in range(2000)]
    assert 0.05 < np.mean([world.held_out(scene) for scene in scenes]) < 0.15


def test_two_figures_are_held_out_in_either_order(rng):
    for _ in range(100):
        scene = world._random_scene(rng, (128, 128), 2)
        assert world.held_out(scene) == world.held_out(scene._replace(figures=scene.figures[::-1]))


@pytest.mark.parametrize("figures", [1, 2])
def test_a_caption_names_shapes_and_colours_in_words_of_the_world(rng, figures):
    def ways(word: str) -> tuple[str, ...]:
        return world.SYNONYMS.get(word, (word,))

    for _ in range(300):
        scene = world.random_scene(rng, world.SIZES[int(rng.integers(3))], figures)
        caption = world.caption(scene, rng)
        for figure in scene.figures:
            shapes = (*ways(figure.shape), world.CLASS)
            phrases = {f"{c} {shape}" for c in ways(figure.colour) for shape in shapes}
            assert any(f" {phrase} " in f" {caption} " for phrase in phrases), caption
        assert set(caption.split()) <= set(world.words())


def test_a_figure_is_painted_in_its_colour_where_it_stands():
    picture = world.paint(SCENE)
    assert tuple(picture[60, 60]) == world.COLOURS["red"]
    background = {
        tuple(tone) for tone in (world.COLOURS["blue"], world.shade(world.COLOURS["blue"]))
    }
    assert tuple(picture[5, 5]) in {tuple(np.round(tone).astype(int)) for tone in background}
