"""The table of buckets that a run keeps: a resume has its buckets, whatever KMeans says now."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft import config as configs
from jaxft import plan, train
from jaxft.data import bucket_table
from jaxft.data.buckets import Buckets, ratio_buckets_from_files, size_buckets_from_files
from jaxft.errors import UserError
from tests.data_fixtures import photo_folder, photograph

SIDES = st.integers(100, 3000)
IMAGES = st.lists(st.tuples(SIDES, SIDES), min_size=2, max_size=30)
OPTIONS = {"_target_": "RatioBucket.from_files", "num_bucket": 2, "target_area": (4096, 65536.5)}


def through_file(sizes, buckets: Buckets, path: Path) -> bucket_table.Saved:
    entry = bucket_table.entry(OPTIONS, sizes, buckets)
    path.write_text(bucket_table.to_text({"d": entry}), "utf-8")
    return bucket_table.read(path)["d"]


@given(sizes=IMAGES, kind=st.sampled_from([ratio_buckets_from_files, size_buckets_from_files]))
@settings(max_examples=30, deadline=None)
def test_the_same_images_have_the_same_buckets(sizes, kind, tmp_path_factory):
    buckets = kind(sizes, num_bucket=2, step_size=8)
    saved = through_file(sizes, buckets, tmp_path_factory.getbasetemp() / "table.json")
    assert bucket_table.matches(saved, OPTIONS)
    nearest = kind(sizes, num_bucket=2, step_size=8, known=saved.sizes)
    restored, added = bucket_table.restore(saved, sizes, nearest)
    assert added == 0
    assert (restored.sizes, restored.scaled) == (buckets.sizes, buckets.scaled)
    np.testing.assert_array_equal(restored.assignment, buckets.assignment)


def test_added_images_go_to_the_nearest_saved_size_and_the_others_stay(tmp_path):
    sizes = [(100, 100), (102, 100), (300, 200), (300, 200)]
    # No KMeans would part these images so.
    odd = Buckets([(64, 64), (96, 64)], np.array([0, 1, 0, 0]))
    saved = through_file(sizes, odd, tmp_path / "table.json")
    now = [*sizes, (103, 100), (400, 200), (300, 200)]
    nearest = ratio_buckets_from_files(now, target_area=4096, known=saved.sizes)
    restored, added = bucket_table.restore(saved, now, nearest)
    assert added == 3
    assert restored.sizes == odd.sizes
    assert restored.assignment.tolist() == [0, 1, 0, 0, 0, 1, 0]


def test_small_images_that_are_added_are_not_enlarged_by_a_resume(tmp_path):
    sizes = [(640, 640), (200, 200), (200, 200)]
    options = {"target_area": 512 * 512, "num_bucket": 1, "no_upscale": True}
    made = ratio_buckets_from_files(sizes, **options)
    assert sorted(made.sizes) == [(192, 192), (512, 512)]
    saved = through_file(sizes, made, tmp_path / "table.json")
    now = [*sizes, (250, 270), (600, 600), (100, 100)]
    nearest = ratio_buckets_from_files(now, known=saved.sizes, **options)
    restored, added = bucket_table.restore(saved, now, nearest)
    trained = [restored.sizes[bucket] for bucket in restored.assignment.tolist()]
    assert trained[:3] == [(512, 512), (192, 192), (192, 192)]
    assert trained[3:] == [(192, 192), (512, 512), (64, 64)]
    assert (added, restored.num_small) == (3, 4)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, '{"d": 3}', '{"d": {"bucket": {}}}', '{"d": {"sizes": {}}}']
    + [
        f'{{"d": {{"bucket": {{}}, "sizes": {sizes}}}}}'
        for sizes in (
            "{}",
            '{"64x64": {}}',
            '{"64x64": 3}',
            '{"60x64": {"1x1": 1}}',
            '{"0x64": {"1x1": 1}}',
            '{"64": {"1x1": 1}}',
            '{"64x64": {"1x0": 1}}',
            '{"64x64": {"1x1": 0}}',
            '{"64x64": {"1x1": "2"}}',
        )
    ],
)
def test_a_damaged_table_is_named(tmp_path, text):
    path = tmp_path / bucket_table.FILE
    path.write_text(text)
    with pytest.raises(UserError, match=r"buckets\.json: not a table of buckets"):
        bucket_table.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"buckets\.json: not a table of buckets"):
        bucket_table.read(path)


# In a run ---------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path) -> Path:
    bucket = {"target_area": 64 * 64, "step_size": 32, "num_bucket": 2}
    source = {"img_root": str(photo_folder(tmp_path / "photos", 8))}
    tree = {
        "_base_": ["configs/train/examples/fine-tuning.yaml"],
        "exp_dir": str(tmp_path / "run"),
        "model": {"pretrained_model_name_or_path": "builtin:demo"},
        "train": {"scheduler": {"num_warmup_steps": 5}},
        "data": {"dataset1": {"source": {"data_source1": source}, "bucket": bucket}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    (tmp_path / "run").mkdir()
    return path


def prepared(recipe: Path, *overrides: str) -> plan.Plan:
    return plan.prepare(*configs.load(str(recipe), list(overrides)))


def sizes_of(made: plan.Plan) -> dict[str, tuple[int, int]]:
    (data,) = made.datasets
    return {record.path.name: size for record, size in data.wanted}


def test_a_resume_has_the_buckets_of_its_run(recipe, tmp_path):
    """A table that KMeans would not give stands for another version of scikit-learn."""
    run, resume = tmp_path / "run", f"train.resume={tmp_path / 'run'}"
    first = prepared(recipe)
    train._write_records(run, first, 0)
    table = run / bucket_table.FILE
    written = table.read_text()
    assert sizes_of(prepared(recipe, resume)) == sizes_of(first)

    tree = json.loads(written)
    held = tree["dataset1"]["sizes"]
    (one, other) = held
    held[one], held[other] = held[other], held[one]
    table.write_text(json.dumps(tree))
    swapped = prepared(recipe, resume)
    there = first.datasets[0].buckets.sizes
    exchanged = dict(zip(there, reversed(there), strict=True))
    assert sizes_of(swapped) == {name: exchanged[size] for name, size in sizes_of(first).items()}
    assert not [notice for notice in swapped.notices if "new" in notice]

    # Images are added: they go to sizes that the run has, and the others stay.
    photograph(2, (200, 60)).save(tmp_path / "photos" / "zz.png")
    shutil.copy(tmp_path / "photos" / "0.png", tmp_path / "photos" / "zy.png")
    for name in ("zy", "zz"):
        (tmp_path / "photos" / f"{name}.txt").write_text("a new photo")
    grown = prepared(recipe, resume)
    assert {k: v for k, v in sizes_of(grown).items() if k[0] != "z"} == sizes_of(swapped)
    assert sizes_of(grown)["zy.png"] == sizes_of(grown)["0.png"]
    assert set(sizes_of(grown).values()) == set(sizes_of(swapped).values())
    assert "data.dataset1: 2 images are new, and go to sizes that the run has" in grown.notices
    train._write_records(run, grown, 7)
    assert json.loads((run / "buckets-until-7.json").read_text()) == tree
    assert sizes_of(prepared(recipe, resume)) == sizes_of(grown)
    assert not [notice for notice in prepared(recipe, resume).notices if "new" in notice]

    # Other options make other buckets.
    single = prepared(recipe, resume, "data.dataset1.bucket.num_bucket=1")
    assert Counter(sizes_of(single).values()).total() == 10
    assert len(set(sizes_of(single).values())) == 1
