"""Crop and flip: another view of an image in every epoch, and what is said of it."""

import numpy as np
import pytest
import random_model
from PIL import Image

from jaxft.data import batches, buckets, images, latents, loader, source
from jaxft.data.images import View
from jaxft.data.tokens import Tokenizer
from tests.data_fixtures import photo_folder, photograph


def record(size, **options) -> source.Record:
    return source.Record(None, "", size, "", ("",), None, (0, 0, 0), **options)  # type: ignore[arg-type]


def test_a_view_is_what_pillow_cuts_out_of_the_scaled_image():
    """Mirrored or not, at every corner that a whole number of columns can give."""
    photo, size = photograph(4, (120, 80)), (40, 40)
    scaled = photo.resize((60, 40), Image.Resampling.LANCZOS)
    for picture, mirrored in (
        (scaled, False),
        (scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT), True),
    ):
        for left in (0, 5, 10, 20):
            view = View(left / 20, 0.5, mirrored)
            got = images.resize_and_crop(photo, size, view).astype(float)
            expected = np.asarray(picture.crop((left, 0, left + 40, 40)), float)
            # Lanczos sees no pixels beyond the kept part, so only the cut edges differ.
            np.testing.assert_allclose(got[:, 3:-3], expected[:, 3:-3], atol=1)
            assert images.corner(photo.size, size, view, scaled=True) == (left, 0)


@pytest.mark.parametrize("size", [(64, 40), (128, 128), (40, 200)])
def test_an_unscaled_view_is_what_pillow_cuts_out(size):
    photo = photograph(1, (96, 64))
    mirrored = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for picture, flipped in ((photo, False), (mirrored, True)):
        for x, y in ((0, 0), (1, 1), (0.25, 0.75)):
            view = View(x, y, flipped)
            left, top = (
                int(max(given - wanted, 0) * share)
                for given, wanted, share in zip(photo.size, size, (x, y), strict=True)
            )
            expected = picture.crop((left, top, left + size[0], top + size[1]))
            got = images.crop_and_pad(photo, size, view)
            np.testing.assert_array_equal(got, np.asarray(expected))
            assert images.corner(photo.size, size, view, scaled=False) == (left, top)


@pytest.mark.parametrize("scaled", [True, False])
def test_random_views_reach_every_corner_alike(scaled):
    """A picture of its own columns and rows shows which part is kept."""
    width, height, size = 12, 10, (8, 8) if not scaled else (12, 8)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    picture = Image.fromarray(np.dstack([x, y, x]).astype(np.uint8))
    fit = images.resize_and_crop if scaled else images.crop_and_pad
    one = record((width, height), crop="random", flip=True, scaled=scaled)
    shaped = buckets.Buckets([size], np.zeros(1, int))
    plan = batches.BatchPlan(shaped, 1, seed=3, name="a")
    seen = []
    for epoch in range(600):
        view = source.framed(one, size, plan.pick(epoch, 0, "view")).view
        assert view == source.framed(one, size, plan.pick(epoch, 0, "view")).view
        got = fit(picture, size, view).astype(int)
        mirrored = bool(got[0, 0, 0] > got[0, -1, 0])
        assert mirrored == view.mirrored
        left, top = images.corner(one.size, size, view, scaled=scaled)
        shown = got[0, -1 if mirrored else 0, 0]
        assert left == (width - size[0] - shown if mirrored else shown)
        assert top == got[0, 0, 1]
        seen.append((left, top, mirrored))
    counts = np.unique(np.array(seen), axis=0, return_counts=True)[1]
    places = (width - size[0] + 1) * (height - size[1] + 1) * 2
    assert len(counts) == places
    # Chi-squared has mean `places` - 1 and a standard deviation of sqrt(2 · places).
    expected = len(seen) / places
    assert ((counts - expected) ** 2 / expected).sum() < places + 5 * np.sqrt(2 * places)


@pytest.mark.parametrize(
    ("original", "size", "wanted"),
    [
        ((1024, 1024), (1024, 1024), (1024, 1024, 0, 0, 1024, 1024)),
        ((2048, 1024), (1024, 1024), (1024, 2048, 0, 512, 1024, 1024)),
        ((512, 1024), (1024, 1024), (1024, 512, 512, 0, 1024, 1024)),
        ((300, 200), (640, 448), (200, 300, 0, 16, 448, 640)),
    ],
)
def test_sizes_are_height_before_width_and_the_crop_in_the_scaled_image(original, size, wanted):
    assert loader.time_ids(record(original), size).tolist() == list(wanted)


def test_both_sides_of_an_image_are_kept_and_drawn(tmp_path):
    """With the cache a batch holds what it holds without it; the two sides are two entries."""
    folder = photo_folder(tmp_path / "photos", 4)
    random_model.write_tokenizer(tmp_path)
    records = source.index(folder, caption_file=folder, flip=True).records
    shaped = buckets.fixed_bucket([r.size for r in records], target_size=32)
    plan = batches.BatchPlan(shaped, 2, seed=0, name="a")
    data = loader.Dataset("a", records, shaped, plan, [Tokenizer(tmp_path)])

    def encode(pixels: np.ndarray) -> np.ndarray:
        corners = pixels[:, ::8, ::8].astype(np.float32)
        return np.concatenate([corners, corners, corners[..., :2]], axis=-1)

    store = latents.cache(data.wanted, encode, batch_size=4)
    assert len(store) == 8
    cached = loader.Dataset("a", records, shaped, plan, [Tokenizer(tmp_path)], moments=store)
    sides = set()
    for n in range(8 * plan.num_batches):
        plain, batch = data.batch(n), cached.batch(n)
        np.testing.assert_array_equal(batch["moments"], encode(plain["pixel_values"]))
        for row, image in enumerate(plan[n].images.tolist()):
            whole = images.decode(records[image].path.read_bytes())
            shown = images.resize_and_crop(whole, (32, 32))
            mirrored = not np.array_equal(plain["pixel_values"][row], shown)
            np.testing.assert_array_equal(
                plain["pixel_values"][row], shown[:, ::-1] if mirrored else shown
            )
            sides.add((image, mirrored))
    assert len(sides) == 8
