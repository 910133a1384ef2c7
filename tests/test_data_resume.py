"""The stream of batches, of several sets of photographs: every state restores all that follows."""

import numpy as np
import pytest
import random_model

from jaxft.data import batches, buckets, loader, source
from jaxft.data.tokens import Tokenizer
from tests.data_fixtures import assert_same_batch, photo_folder

EPOCHS = 3
WORKERS = (0, 4, 16)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> list[loader.Dataset]:
    """Three sets, of different batch sizes, tails, buckets and lengths of an epoch."""
    folder = tmp_path_factory.mktemp("sets")
    random_model.write_tokenizer(folder / "tokenizer")
    tokenizer = Tokenizer(folder / "tokenizer")
    template = folder / "template.txt"
    template.write_text("a photo of {caption}\nthe {caption}\n{caption}")
    fixed = {"target_size": [48, 64]}
    kinds = (
        ("pad", 2, 11, buckets.ratio_buckets_from_files, {"target_area": 64**2, "num_bucket": 3}),
        ("resample", 4, 9, buckets.size_buckets_from_files, {"num_bucket": 2}),
        ("drop", 3, 7, buckets.fixed_bucket, fixed),
    )
    made = []
    for tail, batch_size, count, kind, options in kinds:
        photos = photo_folder(folder / tail, count)
        records, _ = source.index(photos, caption_file=photos, prompt_template=template)
        step = {} if kind is buckets.fixed_bucket else {"step_size": 8}
        shaped = kind([record.size for record in records], **options, **step)
        records = [record._replace(scaled=shaped.scaled) for record in records]
        plan = batches.BatchPlan(shaped, batch_size, seed=3, name=tail, tail=tail)
        made.append(loader.Dataset(tail, records, shaped, plan, [tokenizer], with_sizes=True))
    return made


@pytest.mark.parametrize("workers", WORKERS)
def test_state_saved_before_every_batch_restores_the_whole_stream(datasets, workers):
    """The sets side by side, as a step takes them; written by one number of workers, read by
    another."""
    others = WORKERS[(WORKERS.index(workers) + 1) % len(WORKERS)]
    total = EPOCHS * max(data.num_batches for data in datasets)
    streams = [loader.open(data, workers=workers) for data in datasets]
    states, steps = [], []
    for _ in range(total):
        states.append([stream.get_state() for stream in streams])
        steps.append([next(stream) for stream in streams])
    for stream in streams:
        stream.close()
    again = [loader.open(data, workers=others) for data in datasets]
    for start, saved in enumerate(states):
        for stream, state in zip(again, saved, strict=True):
            stream.set_state(state)
        for step in steps[start:]:
            for stream, batch in zip(again, step, strict=True):
                assert_same_batch(next(stream), batch)
    for stream in again:
        stream.close()


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_order_and_captions_do_not_depend_on_the_devices(datasets, devices):
    """The rows that 1, 2, 4 or 8 devices take of a batch are, together, the batch of one device."""
    data = datasets[0]
    plan = batches.BatchPlan(data.buckets, 8 // devices * devices, seed=3, name=data.name)
    whole = batches.BatchPlan(data.buckets, 8, seed=3, name=data.name)
    shared = loader.Dataset(data.name, data.records, data.buckets, plan, data.tokenizers)
    alone = loader.Dataset(data.name, data.records, data.buckets, whole, data.tokenizers)
    for n in range(2 * whole.num_batches):
        rows = [slice(8 // devices * i, 8 // devices * (i + 1)) for i in range(devices)]
        shares = [shared.batch(n, part) for part in rows]
        joined = {k: np.concatenate([s[k] for s in shares]) for k in shares[0]}
        assert_same_batch(alone.batch(n), joined)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_more_devices_take_the_images_of_a_bucket_in_the_same_order(datasets, devices):
    """With one `batch_size` for each device, what 8 devices take at once one takes in 8 steps."""
    shaped = datasets[0].buckets

    def order(batch_size: int) -> dict[int, set[tuple[int, ...]]]:
        plan = batches.BatchPlan(shaped, batch_size, seed=3, name="d")
        drawn = [plan[n] for n in range(plan.num_batches)]
        rows = {b: np.flatnonzero(shaped.assignment == b) for b in range(len(shaped.sizes))}
        return {
            b: {tuple(d.images[d.weights > 0].tolist()) for d in drawn if d.bucket == b}
            for b in rows
        }

    (whole,) = zip(*order(1000).values(), strict=True)  # one batch for each bucket
    for bucket, images in enumerate(whole):
        parts = [images[i : i + 2 * devices] for i in range(0, len(images), 2 * devices)]
        assert order(2 * devices)[bucket] == set(parts)
