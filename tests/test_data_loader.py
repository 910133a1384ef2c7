from itertools import pairwise

import numpy as np
import pytest
import random_model

from jaxft.data import batches, buckets, images, latents, loader, source, text_transforms
from jaxft.data.tokens import Tokenizer
from jaxft.errors import UserError
from tests.data_fixtures import assert_same_batch, photo_folder

AREA = 64 * 64
EPOCH = 6  # batches: 11 images in 3 buckets of 4, 5 and 2 by twos


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = photo_folder(tmp_path_factory.mktemp("data") / "photos")
    template = folder.parent / "template.txt"
    template.write_text("a {pt1}, {caption}\nthe {pt1}, {caption}\n{caption}")
    records, _ = source.index(
        folder,
        caption_file=folder,
        prompt_template=template,
        word_names={"pt1": "sks"},
        text_transforms=[
            text_transforms.tag_dropout(0.5),
            text_transforms.suffix("{here|there}"),
            text_transforms.wildcards(),
            text_transforms.tag_shuffle(),
        ],
    )
    random_model.write_tokenizer(folder.parent / "tokenizer")
    sizes = [record.size for record in records]
    shaped = buckets.ratio_buckets_from_files(sizes, target_area=AREA, step_size=8, num_bucket=3)
    return records, shaped, Tokenizer(folder.parent / "tokenizer")


def dataset(parts, batch_size=2, **options) -> loader.Dataset:
    records, shaped, tokenizer = parts
    plan = batches.BatchPlan(shaped, batch_size, seed=0, name="dataset1")
    return loader.Dataset("dataset1", records, shaped, plan, [tokenizer], **options)


def encode(pixels: np.ndarray) -> np.ndarray:
    """A stand-in for the VAE that mixes no images: each 8x8 patch's corner and brightness."""
    b, h, w, _ = pixels.shape
    patches = pixels.reshape(b, h // 8, 8, w // 8, 8, 3).astype(np.float32)
    corner, mean = patches[:, :, 0, :, 0], patches.mean(axis=(2, 4))
    return np.concatenate([corner, mean, corner[..., :1], mean[..., :1]], axis=-1)


def test_a_batch_holds_the_images_of_the_plan(parts):
    records, shaped, tokenizer = parts
    data = dataset(parts, repeats=2)
    for n in range(2 * data.num_batches):
        batch, drawn = data.batch(n), data.plan[n]
        size = shaped.sizes[drawn.bucket]
        assert batch["input_ids"].dtype == np.int32
        assert batch["weight"].dtype == np.float32
        for row, image in enumerate(drawn.images.tolist()):
            whole = images.decode(records[image].path.read_bytes())
            cropped = images.resize_and_crop(whole, size)
            np.testing.assert_array_equal(batch["pixel_values"][row], cropped)
            prompt = source.prompt(records[image], data.plan.pick(drawn.epoch, image))
            np.testing.assert_array_equal(batch["input_ids"][row], tokenizer.encode(prompt, 2))


def test_template_lines_are_drawn_anew_each_epoch(parts):
    plan = dataset(parts).plan
    lines = [[plan.pick(epoch, image) % 3 for image in range(11)] for epoch in range(20)]
    assert len({tuple(line) for line in lines}) == 20
    assert set(np.ravel(lines)) == {0, 1, 2}


def test_shapes_count_images_and_batches(parts):
    data = dataset(parts)
    assert sum(shape.num_images for shape in data.shapes) == len(data.records) == 11
    assert sum(shape.num_batches for shape in data.shapes) == data.num_batches
    seen = {data.batch(n)["pixel_values"].shape for n in range(data.num_batches)}
    assert seen == {(2, shape.size[1], shape.size[0], 3) for shape in data.shapes}


def test_prompts_that_lose_their_end_are_told(parts):
    records, shaped, tokenizer = parts
    long = records[4]._replace(captions=(records[4].captions[0] + " word" * 40,))
    changed = ([*records[:4], long, *records[5:]], shaped, tokenizer)
    assert dataset(parts).truncated == []
    assert dataset(changed).truncated == [long.path.name]
    assert dataset(changed, repeats=3).truncated == []


def test_the_prompt_that_is_judged_is_the_longest_that_can_come_out(parts):
    """Whether any of many prompts is cut, for captions about as long as a row."""
    records, _, tokenizer = parts
    told = 0
    for words in range(0, 40, 2):
        text = "word " * words + "{a|one two three}, red, blue"
        record = records[0]._replace(captions=(text, "short"))
        data = dataset(([record], buckets.fixed_bucket([(64, 64)]), tokenizer))
        prompts = {source.prompt(record, data.plan.pick(epoch, 0)) for epoch in range(300)}
        cut = any(not tokenizer.fits(prompt) for prompt in prompts)
        assert cut == bool(data.truncated)
        told += cut
    assert 0 < told < 20


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_stream_is_the_plan_for_any_number_of_workers(parts, workers):
    data = dataset(parts)
    stream = loader.open(data, workers=workers)
    for n in range(3 * data.num_batches):
        assert_same_batch(next(stream), data.batch(n))
    stream.close()


def test_resume_at_every_position(parts):
    """State saved before each batch of three epochs; each restored, all that follows compared."""
    data = dataset(parts)
    total = 3 * data.num_batches
    stream = loader.open(data, workers=2)
    states, batches = [], []
    for _ in range(total):
        states.append(stream.get_state())
        batches.append(next(stream))
    for start, state in enumerate(states):
        stream.set_state(state)
        resumed = loader.open(data, start, workers=4)
        for n in range(start, min(start + data.num_batches + 1, total)):
            assert_same_batch(next(stream), batches[n])
            assert_same_batch(next(resumed), batches[n])
        resumed.close()
    stream.close()


def test_processes_share_a_batch(parts):
    data = dataset(parts, 4)
    for n in range(data.num_batches):
        whole, halves = data.batch(n), [data.batch(n, slice(0, 2)), data.batch(n, slice(2, 4))]
        joined = {name: np.concatenate([half[name] for half in halves]) for name in whole}
        assert_same_batch(whole, joined)


# Moments ----------------------------------------------------------------------------------------


def test_cached_moments_are_those_of_each_image(parts):
    data = dataset(parts)
    shapes = []

    def counting(pixels):
        shapes.append(pixels.shape)
        return encode(pixels)

    store = latents.cache(data.wanted, counting, batch_size=4)
    cached = dataset(parts, moments=store)
    for n in range(data.num_batches):
        plain, batch = data.batch(n), cached.batch(n)
        np.testing.assert_array_equal(batch.pop("moments"), encode(plain.pop("pixel_values")))
        assert_same_batch(batch, plain)
    assert len(store) == 11
    assert {shape[0] for shape in shapes} == {4}
    changes = sum(a != b for a, b in pairwise(shapes))
    assert changes == len(data.shapes) - 1  # one size after the other


def test_what_is_wanted_twice_is_encoded_once(parts):
    wanted = list(dataset(parts).wanted)
    calls = []

    def counting(pixels):
        calls.append(len(pixels))
        return encode(pixels)

    store = latents.cache([*wanted, *wanted], counting, batch_size=1)
    assert sum(calls) == len(store) == 11
    other = [(record, (64, 64)) for record, _ in wanted]
    assert len(latents.cache(wanted + other, encode, batch_size=8)) > 11


def test_like_names_share_nothing(tmp_path):
    """The same file name in two folders: HCP-Diffusion gives both the latents of one."""
    first, second = photo_folder(tmp_path / "a", 1), photo_folder(tmp_path / "b", 2)
    (second / "1.jpg").rename(second / "0.png")
    wanted = [(source.index(f).records[0], (64, 64)) for f in (first, second)]
    store = latents.cache(wanted, encode, batch_size=2)
    for record, size in wanted:
        expected = encode(source.pixels(record, size)[None])[0]
        np.testing.assert_array_equal(store[latents.key(record, size)], expected)


def test_moments_that_are_not_finite_name_the_image(parts):
    def broken(pixels):
        moments = encode(pixels)
        moments[1, 0, 0, 0] = np.nan
        return moments

    wanted = [(record, (64, 64)) for record in parts[0]]
    with pytest.raises(UserError, match=wanted[1][0].path.name):
        latents.cache(wanted, broken, batch_size=4)


def test_an_image_that_changes_or_goes_ends_the_run_by_name(tmp_path):
    folder = photo_folder(tmp_path / "photos", 2)
    records, _ = source.index(folder, caption_file=folder)
    random_model.write_tokenizer(tmp_path)
    shaped = buckets.fixed_bucket([r.size for r in records], target_size=32)
    data = dataset((records, shaped, Tokenizer(tmp_path)))
    (folder / "1.jpg").unlink()
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"1\.jpg"):
            next(loader.open(data, workers=workers))
    with pytest.raises(UserError, match=r"1\.jpg"):
        latents.cache(data.wanted, encode, batch_size=2)
