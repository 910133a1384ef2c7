"""Attention masks: HCP-Diffusion's curve, cut like the image, multiplied into the loss."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from jaxft.data import masks, source
from jaxft.data.images import CENTRE, View
from jaxft.diffusion import losses
from jaxft.errors import UserError
from tests.data_fixtures import photo_folder, photograph, with_and_without_cache


def encoded(grey: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def curve(grey: np.ndarray) -> np.ndarray:
    """As stated of HCP-Diffusion."""
    grey = grey.astype(float)
    return np.where(grey <= 127, grey / 127, 1 + 4 * (grey - 127) / 128)


def means(pixels: np.ndarray) -> np.ndarray:
    """Of the 8 x 8 pixels of each latent."""
    return np.array(
        [
            [pixels[y : y + 8, x : x + 8].mean() for x in range(0, pixels.shape[1], 8)]
            for y in range(0, pixels.shape[0], 8)
        ]
    )


def test_every_grey_value_has_hcp_diffusions_weight():
    values = np.arange(256).repeat(64).reshape(16, 16, 8, 8).swapaxes(1, 2).reshape(128, 128)
    got = masks.weights(encoded(values), (128, 128), (128, 128), CENTRE, scaled=True)
    np.testing.assert_allclose(got.ravel(), curve(np.arange(256)), atol=1e-5)
    assert got.ravel()[[0, 127, 255]].tolist() == [0, 1, 5]


@pytest.mark.parametrize("view", [CENTRE, View(0, 0.5), View(0.25, 1, True)])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_mask_is_cut_as_its_image(view, scaled):
    """No pixel is scaled here, so the cut is one of whole pixels, by Pillow."""
    grey = np.asarray(photograph(1, (96, 64)).convert("L"))
    size = (64, 64) if scaled else (64, 48)
    left, top = (round((g - s) * w) for g, s, w in zip((96, 64), size, view[:2], strict=True))
    shown = curve(grey[:, ::-1] if view.mirrored else grey)
    expected = means(shown[top : top + size[1], left : left + size[0]])
    got = masks.weights(encoded(grey), (96, 64), size, view, scaled=scaled)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_padding_does_not_count_and_a_mask_may_be_small():
    white = encoded(np.full((64, 32), 255))
    got = masks.weights(white, (32, 64), (64, 64), CENTRE, scaled=False)
    np.testing.assert_array_equal(got, np.where(np.arange(8) < 4, 5.0, 0.0) + np.zeros((8, 8)))
    halves = np.repeat([[0, 127]], 2, axis=0)  # 2 x 2 pixels over an image of 512 x 512
    got = masks.weights(encoded(halves), (512, 512), (64, 64), CENTRE, scaled=True)
    np.testing.assert_allclose(got, np.where(np.arange(8) < 4, 0.0, 1.0) + np.zeros((8, 8)))


def test_the_loss_is_the_mean_of_the_masked_errors(rng):
    """`mean(criterion(...) * mask)`, as HCP-Diffusion's; not divided by the mask's sum."""
    predicted, wanted = rng.standard_normal((2, 3, 4, 6, 4)).astype(np.float32)
    mask = rng.uniform(0, 5, (3, 4, 6)).astype(np.float32)
    ours = losses.image_errors(predicted, wanted, mask=mask).mean()
    error = torch.nn.functional.mse_loss(
        torch.tensor(predicted), torch.tensor(wanted), reduction="none"
    )
    theirs = (error * torch.tensor(mask)[..., None]).mean()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    each = losses.image_errors(predicted, wanted, mask=mask)
    filled = losses.mean(each, np.array([1, 0, 1], np.float32))
    np.testing.assert_allclose(filled, each[::2].mean(), rtol=1e-6)


@pytest.fixture
def folder(tmp_path):
    photo_folder(tmp_path / "photos", 4)
    (tmp_path / "masks").mkdir()
    for n, size in enumerate([(64, 64), (96, 64), (64, 96)]):
        photograph(n + 1, size).convert("L").save(tmp_path / f"masks/{n}.webp", lossless=True)
    return tmp_path


def test_a_batch_has_the_masks_of_its_images_cached_or_not(folder):
    options = {"caption_file": folder / "photos", "att_mask": folder / "masks", "flip": True}
    records, notices = source.index(folder / "photos", **options)
    assert any("images without mask, all of which counts: 3.jpg" in n for n in notices)
    data, cached = with_and_without_cache(records, folder)
    plan = data.plan
    sides = set()
    for n in range(6 * plan.num_batches):
        batch = data.batch(n)
        np.testing.assert_array_equal(cached.batch(n)["mask"], batch["mask"])
        for row, image in enumerate(plan[n].images.tolist()):
            if image == 0:
                grey = np.asarray(photograph(1, (64, 64)).convert("L"))
                straight, mirrored = means(curve(grey)), means(curve(grey[:, ::-1]))
                side = bool(np.abs(batch["mask"][row] - mirrored).max() < 1e-4)
                whole = source.pixels(records[0], (64, 64))
                assert side != np.array_equal(batch["pixel_values"][row], whole)
                assert side or np.abs(batch["mask"][row] - straight).max() < 1e-4
                sides.add(side)
            if image == 3:
                assert (batch["mask"][row] == 1).all()
    assert sides == {True, False}


def test_masks_that_cannot_be_used_are_named(folder):
    options = {"caption_file": folder / "photos", "att_mask": folder / "masks"}
    Image.new("L", (64, 32)).save(folder / "masks/0.webp")
    (folder / "masks/1.webp").write_bytes(b"no image")
    Image.new("L", (64, 96)).save(folder / "masks/2.png")
    with pytest.raises(UserError) as caught:
        source.index(folder / "photos", **options)
    told = str(caught.value)
    assert "0.png: its mask 0.webp: the mask is 64x32, its image 64x64" in told
    assert "1.jpg: its mask 1.webp: not an image" in told
    assert "2: several masks: 2.png, 2.webp" in told
    with pytest.raises(UserError, match=r"att_mask: .*none does not exist"):
        source.index(folder / "photos", att_mask=folder / "none")
    with pytest.raises(UserError, match="is img_root"):
        source.index(folder / "photos", att_mask=folder / "photos")
    (folder / "others").mkdir()
    Image.new("L", (64, 64)).save(folder / "others/x.png")
    with pytest.raises(UserError, match="no mask that is named as one of the images"):
        source.index(folder / "photos", att_mask=folder / "others")


def test_masks_below_the_images_are_no_images(folder):
    (folder / "masks").rename(folder / "photos/masks")
    records, _ = source.index(folder / "photos", att_mask=folder / "photos/masks", recursive=True)
    assert [record.path.name for record in records] == ["0.png", "1.jpg", "2.png", "3.jpg"]
    assert [bool(record.mask) for record in records] == [True, True, True, False]
    (folder / "photos/masks/0.webp").unlink()
    with pytest.raises(UserError, match=r"0\.webp.*it was there"):
        source.loss_weights(records[0], (64, 64))


@pytest.mark.parametrize("scaled", [True, False])
def test_a_crop_keeps_what_the_mask_shows(folder, scaled):
    """Wherever it lies, and on both sides; what does not fit is kept around its middle."""
    picture, size = photograph(3, (128, 64)), (64, 64) if scaled else (48, 48)
    for left, top, width, height in (
        (3, 9, 40, 40),
        (70, 2, 48, 48),
        (125, 60, 3, 4),
        (0, 0, 1, 1),
    ):
        grey = np.full((64, 128), 3, np.uint8)
        grey[top : top + height, left : left + width] = 200
        picture.save(folder / "photos/0.png")
        Image.fromarray(grey).save(folder / "masks/0.webp", lossless=True)
        options = {"att_mask": folder / "masks", "crop": "mask", "flip": True}
        record = source.index(folder / "photos", **options).records[0]._replace(scaled=scaled)
        straight, mirrored = source.views(record, size)
        assert [source.framed(record, size, pick) for pick in (0, 1)] == [straight, mirrored]
        kept = source.loss_weights(straight, size)
        expected = curve(grey)[top : top + height, left : left + width].sum()
        seen = kept.sum() * 64 - (size[0] * size[1] - width * height) * 3 / 127
        np.testing.assert_allclose(seen, expected, rtol=1e-4)
        np.testing.assert_array_equal(source.loss_weights(mirrored, size), kept[:, ::-1])
    bar = np.zeros((64, 128), np.uint8)
    bar[:, 20:120] = 255
    Image.fromarray(bar).save(folder / "masks/0.webp", lossless=True)
    record = source.index(folder / "photos", **options).records[0]
    assert source.views(record, (64, 64))[0].view == View((70 - 32) / 64, 0.5)


def test_what_has_no_mask_is_cropped_in_the_middle(folder):
    options = {"att_mask": folder / "masks", "crop": "mask"}
    Image.new("L", (64, 64), 9).save(folder / "masks/0.webp")  # it shows nothing in particular
    records = source.index(folder / "photos", **options).records
    for record in (records[0], records[3]):
        assert source.framed(record, (32, 64), 5).view == CENTRE
    with pytest.raises(UserError, match=r"crop: mask .* name att_mask"):
        source.index(folder / "photos", crop="mask")
