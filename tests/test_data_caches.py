"""Caches of latents and prompts: what has changed is computed again, and nothing else."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import random_model
from PIL import Image

from jaxft.data import buckets, latents, loader, source, text_states
from jaxft.data.batches import BatchPlan
from jaxft.data.disk import Disk, Memory
from jaxft.data.tokens import Tokenizer
from jaxft.errors import UserError
from tests.data_fixtures import photo_folder

SIZE = (32, 48)


def encode(pixels: np.ndarray) -> np.ndarray:
    """A stand-in for the VAE that mixes no images: the mean colour of each patch."""
    b, h, w, _ = pixels.shape
    mean = pixels.reshape(b, h // 8, 8, w // 8, 8, 3).astype(np.float32).mean(axis=(2, 4))
    return np.concatenate([mean, mean, mean[..., :2]], axis=-1)


# ---------------------------------------------------------------------------------------- latents


@pytest.fixture
def photos(tmp_path) -> Path:
    return photo_folder(tmp_path / "photos", 5)


def wanted(photos: Path, size=SIZE, **options) -> list:
    found = source.index(photos, caption_file=photos, **options)
    return [(record, size) for record in found.records]


def encoded(folder: Path, wanted: list, vae: str = "x") -> int:
    """How many images are encoded for a data set; what the cache then holds is compared."""
    count = 0

    def counting(pixels: np.ndarray) -> np.ndarray:
        nonlocal count
        count += len(pixels)
        return encode(pixels)

    store = latents.cache(wanted, counting, batch_size=1, store=Disk(folder, {"vae": vae}))
    assert isinstance(store, Disk)
    for record, size in wanted:
        expected = encode(source.pixels(record, size)[None])[0]
        np.testing.assert_array_equal(store[latents.key(record, size)], expected)
    return count


def test_exactly_what_has_changed_is_encoded_again(photos, tmp_path):
    cache = tmp_path / "cache"
    assert encoded(cache, wanted(photos)) == 5
    assert encoded(cache, wanted(photos)) == 0
    (photos / "2.txt").write_text("another caption")
    assert encoded(cache, wanted(photos)) == 0
    with Image.open(photos / "2.png") as image:
        image.putpixel((0, 0), (9, 9, 9))
        image.save(photos / "2.png")
    assert encoded(cache, wanted(photos)) == 1
    (photos / "3.jpg").rename(photos / "7.jpg")
    (photos / "3.txt").rename(photos / "7.txt")
    assert encoded(cache, wanted(photos)) == 0
    assert encoded(cache, wanted(photos, (48, 32))) == 5
    assert encoded(cache, wanted(photos, bg_color=(0, 0, 0))) == 5
    assert encoded(cache, wanted(photos), vae="y") == 5
    assert encoded(cache, wanted(photos)) == 0


def test_every_field_of_a_key_counts(photos):
    record = latents.key(*wanted(photos)[0])
    others = [record._replace(**{field: "other"}) for field in latents.Key._fields]
    store = Disk(Path("nowhere"), {})
    assert len({store._name(key) for key in [record, *others]}) == len(others) + 1


def test_what_was_encoded_before_an_error_or_a_stop_is_kept(photos, tmp_path):
    calls: list[int] = []

    def broken(pixels: np.ndarray) -> np.ndarray:
        calls.append(len(pixels))
        return encode(pixels) * (np.nan if len(calls) == 4 else 1)

    every = wanted(photos)
    with pytest.raises(UserError, match="not finite"):
        latents.cache(every, broken, batch_size=1, store=Disk(tmp_path / "cache", {}))
    assert len(Disk(tmp_path / "cache", {}).missing([latents.key(*w) for w in every])) == 2
    stopped = latents.cache(every, encode, batch_size=2, stopped=lambda: True)
    assert isinstance(stopped, Memory)
    assert len(stopped) == 2


# ----------------------------------------------------------------------------------- text encoders


@pytest.fixture
def dataset(photos, tmp_path) -> loader.Dataset:
    template = tmp_path / "template.txt"
    template.write_text("a {caption}\nthe {caption}\n")
    records, _ = source.index(photos, caption_file=photos, prompt_template=template)
    random_model.write_tokenizer(tmp_path / "tokenizer")
    tokenizers = [Tokenizer(tmp_path / "tokenizer")] * 2
    shaped = buckets.fixed_bucket([record.size for record in records], target_size=32)
    plan = BatchPlan(shaped, 2, seed=0, name="dataset1")
    return loader.Dataset("dataset1", records, shaped, plan, tokenizers, 2, with_sizes=True)


def states(ids: list[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """A stand-in for the text encoders that mixes no prompts."""
    rows = np.concatenate([part.reshape(len(part), -1) for part in ids], axis=1)
    yield "encoder_hidden_states", (rows[:, :, None] * np.float32([1, 0.5])).astype(np.float16)
    yield "pooled_text_embeds", rows[:, :3].astype(np.float32)


def texts(dataset: loader.Dataset, folder: Path | None) -> tuple[text_states.Store, int]:
    """The cache of a data set's prompts, and how many were encoded for it."""
    seen = set()

    def counting(ids: list[np.ndarray]) -> dict[str, np.ndarray]:
        seen.update(row.tobytes() for row in np.concatenate(ids, axis=1))
        return dict(states(ids))

    store = Disk(folder, {"text_encoder": "x"}) if folder else None
    store = text_states.cache(dataset.wanted_texts, counting, batch_size=3, store=store)
    return store, len(seen)


def test_batches_hold_the_states_of_their_prompts(dataset, tmp_path):
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        store, _ = texts(dataset, folder)
        cached = replace(dataset, text=store)
        for n in range(2 * dataset.num_batches):
            plain, batch = dataset.batch(n), cached.batch(n)
            ids = [plain.pop("input_ids"), plain.pop("input_ids_2")]
            expected = plain | dict(states(ids))
            assert batch.keys() == expected.keys()
            for name in expected:
                assert batch[name].dtype == expected[name].dtype
                np.testing.assert_array_equal(batch[name], expected[name])


def test_exactly_the_prompts_that_have_changed_are_encoded_again(dataset, tmp_path):
    cache = tmp_path / "cache"
    assert texts(dataset, cache)[1] == 10
    assert texts(dataset, cache)[1] == 0
    first = dataset.records[0]._replace(captions=("something else",))
    assert texts(replace(dataset, records=[first, *dataset.records[1:]]), cache)[1] == 2
    other = [record._replace(digest="other") for record in dataset.records]
    assert texts(replace(dataset, records=other), cache)[1] == 0
    assert texts(replace(dataset, repeats=1), cache)[1] == 10
