"""Conditioning images: cut as their images, in every batch, or refused before the first step."""

import json
import shutil

import numpy as np
import pytest
import random_model
from PIL import Image

from jaxft import config as configs
from jaxft import plan, report
from jaxft.data import batches, beside, buckets, loader, source
from jaxft.data.images import CENTRE, View
from jaxft.data.tokens import Tokenizer
from jaxft.errors import UserError
from tests.data_fixtures import photo_folder, with_and_without_cache


@pytest.fixture
def folder(tmp_path):
    """Four photographs, and beside each the same as a file of another format."""
    photos = photo_folder(tmp_path / "photos", 4)
    (tmp_path / "seen").mkdir()
    for path in photos.glob("*.[jp]*g"):
        Image.open(path).save(tmp_path / f"seen/{path.stem}.webp", lossless=True)
    return tmp_path


@pytest.mark.parametrize("bucket", [buckets.fixed_bucket, buckets.size_buckets_from_files])
def test_a_conditioning_image_is_cut_as_its_image(folder, bucket):
    """What lies beside an image is that image: so they stay the same, however both are cut."""
    random_model.write_tokenizer(folder)
    options = {"caption_file": folder / "photos", "cond_dir": folder / "seen"}
    found = source.index(folder / "photos", **options, crop="random", flip=True)
    assert not found.notices
    sizes = [record.size for record in found.records]
    options = {"target_size": 48} if bucket is buckets.fixed_bucket else {"num_bucket": 2}
    shaped = bucket(sizes, **options)
    records = [record._replace(scaled=shaped.scaled) for record in found.records]
    plan = batches.BatchPlan(shaped, 2, seed=0, name="a")
    data = loader.Dataset("a", records, shaped, plan, [Tokenizer(folder)])
    seen = set()
    for n in range(4 * plan.num_batches):
        batch = data.batch(n)
        np.testing.assert_array_equal(batch["conditioning_pixel_values"], batch["pixel_values"])
        seen |= {pixels.tobytes() for pixels in batch["pixel_values"]}
    assert len(seen) > 4, "no other view of an image was drawn"
    assert "cond_dir: 4 images, each with its conditioning image" in report.bucket_lines(data)


def test_cached_latents_come_with_the_same_conditioning_images(folder):
    options = {"caption_file": folder / "photos", "cond_dir": folder / "seen"}
    records, _ = source.index(folder / "photos", **options, flip=True)
    data, cached = with_and_without_cache(records, folder)
    plan = data.plan
    for n in range(3 * plan.num_batches):
        seen = "conditioning_pixel_values"
        np.testing.assert_array_equal(cached.batch(n)[seen], data.batch(n)[seen])


@pytest.mark.parametrize("view", [CENTRE, View(0, 0.5), View(0.25, 1, True)])
@pytest.mark.parametrize("scaled", [True, False])
def test_it_may_have_more_or_fewer_pixels_than_its_image(view, scaled):
    """A slope of grey is the same slope in any number of pixels."""

    def slope(width: int, height: int) -> Image.Image:
        x, y = (np.arange(width) + 0.5) / width, (np.arange(height)[:, None] + 0.5) / height
        return Image.fromarray((40 + 100 * x + 60 * y).round().astype(np.uint8)).convert("RGB")

    original, size = (192, 128), (64, 64) if scaled else (96, 80)
    cut = [
        beside.pixels(slope(*own), original, size, view, scaled=scaled).astype(int)
        for own in (original, (384, 256), (96, 64))
    ]
    for other in cut[1:]:
        inner = (other - cut[0])[3:-3, 3:-3]  # a filter sees no more than the cut or the edge
        assert np.abs(inner).max() <= 2


def test_what_is_missing_or_cannot_be_used_is_named(folder):
    photos, seen = folder / "photos", folder / "seen"
    options = {"caption_file": photos, "cond_dir": seen}
    (seen / "0.webp").unlink()
    (seen / "1.webp").write_bytes(b"no image")
    Image.new("RGB", (64, 64)).save(seen / "2.webp")
    shutil.copy(seen / "3.webp", seen / "3.png")
    with pytest.raises(UserError) as caught:
        source.index(photos, **options)
    told = str(caught.value)
    assert "0.png: no conditioning image" in told
    assert "1.jpg: its conditioning image 1.webp: not an image" in told
    assert "2.png: its conditioning image 2.webp: the conditioning image is 64x64, its" in told
    assert "3: several conditioning images: 3.png, 3.webp" in told
    with pytest.raises(UserError, match=r"cond_dir: .*none does not exist"):
        source.index(photos, cond_dir=folder / "none")
    with pytest.raises(UserError, match=r"cond_dir: .* is img_root"):
        source.index(photos, cond_dir=photos)


def test_one_that_has_changed_since_is_refused(folder):
    options = {"caption_file": folder / "photos", "cond_dir": folder / "seen"}
    records, _ = source.index(folder / "photos", **options)
    shutil.copy(folder / "seen/1.webp", folder / "seen/0.webp")
    with pytest.raises(UserError, match=r"0\.webp has changed"):
        source.conditioning_pixels(records[0], (64, 64))


TABLES = {
    "metadata.jsonl": lambda rows: "\n".join(json.dumps(row) for row in rows),
    "metadata.csv": lambda rows: "\n".join(
        [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    ),
    "captions.json": lambda rows: json.dumps({row.pop("file_name"): row for row in rows}),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_column_names_what_lies_beside_an_image(folder, name):
    """As in a Hugging Face imagefolder for diffusers' trainer; no such file is trained on itself,
    and several images may share one."""
    (folder / "seen").rename(folder / "photos/seen")
    for path in (folder / "photos").glob("*.txt"):
        path.unlink()
    files = [path.name for path in sorted((folder / "photos").iterdir()) if path.is_file()]
    seen = ["seen/0.webp", "seen/1.webp", "./seen/2.webp", "seen/1.webp"]
    Image.open(folder / "photos/1.jpg").save(folder / "photos/3.jpg")  # of the same shape
    rows = [
        {"file_name": file, "text": f"photo {file}", "conditioning_image": other}
        for file, other in zip(files, seen, strict=True)
    ]
    (folder / "photos" / name).write_text(TABLES[name](rows))
    options = {"caption_file": folder / "photos", "recursive": True}
    options["cond_column"] = "conditioning_image"
    # An image that no row names, nor a column, is one of the source, and lacks all.
    with pytest.raises(UserError) as caught:
        source.index(folder / "photos", **options)
    told = str(caught.value)
    assert "seen/3.webp: no caption" in told
    assert "seen/3.webp: no conditioning image" in told
    (folder / "photos/seen/3.webp").unlink()
    records = source.index(folder / "photos", **options).records
    assert [record.name for record in records] == files
    for record, other in zip(records, seen, strict=True):
        assert record.captions == (f"photo {record.name}",)
        assert record.cond
        assert record.cond.path == folder / "photos" / other


def test_a_column_that_is_not_there_or_leads_elsewhere_is_named(folder):
    photos, column = folder / "photos", "conditioning_image"
    with pytest.raises(UserError, match=r"cond_column: .* in no table"):
        source.index(photos, caption_file=photos, cond_column=column)
    for options in ({}, {"caption_file": photos, "cond_dir": folder / "seen"}):
        with pytest.raises(UserError, match="in place of cond_dir"):
            source.index(photos, cond_column=column, **options)
    table = folder / "c.json"
    rows = {f"{n}.{'jpg' if n % 2 else 'png'}": {"text": "a"} for n in range(4)}
    table.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"no row of c\.json has a 'conditioning_image'"):
        source.index(photos, caption_file=table, cond_column=column)
    for name, other in zip(rows, ("../seen/0.webp", "none.png", 5, "3.jpg"), strict=True):
        rows[name][column] = other
    table.write_text(json.dumps(rows))
    with pytest.raises(UserError) as caught:
        source.index(photos, caption_file=table, cond_column=column)
    told = str(caught.value)
    assert "c.json: conditioning_image '../seen/0.webp' leads out of the folder" in told
    assert "1.jpg: its conditioning image none.png: no such file" in told
    assert "'2.png' stands beside a `conditioning_image` that is not text" in told


def test_all_sources_of_a_data_set_have_them_or_none(folder, nano_model):
    where = "data.dataset1.source"
    lines = [
        f"model.pretrained_model_name_or_path={nano_model}",
        "data.dataset1.bucket.num_bucket=1",
    ]
    for key in ("data_source1", "other"):
        lines += [
            f"{where}.{key}.img_root={folder / 'photos'}",
            f"{where}.{key}.prompt_template=null",
        ]
    lines.append(f"{where}.other.cond_dir={folder / 'seen'}")
    with pytest.raises(UserError, match=r"data\.dataset1: some of its sources have cond_dir"):
        plan.prepare(*configs.load("configs/train/examples/fine-tuning.yaml", lines))
