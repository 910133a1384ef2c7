"""Which images make up which batch: each once an epoch, in an order that the number gives."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.batches import BatchPlan
from jaxft.data.buckets import Buckets, fixed_bucket
from jaxft.errors import UserError

ASSIGNMENTS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def buckets_of(assignment) -> Buckets:
    kept = sorted(set(assignment))
    index = np.array([kept.index(a) for a in assignment])
    return Buckets([(64, 64 + 8 * a) for a in kept], index)


@given(ASSIGNMENTS, st.integers(1, 9), st.integers(0, 5), st.sampled_from(["pad", "resample"]))
@settings(max_examples=150, deadline=None)
def test_every_image_comes_once_an_epoch(assignment, batch_size, epoch, tail):
    buckets = buckets_of(assignment)
    plan = BatchPlan(buckets, batch_size, seed=1, name="d", tail=tail)
    counts = np.bincount(buckets.assignment)
    assert plan.num_batches == sum(-(-count // batch_size) for count in counts)
    first, seen = epoch * plan.num_batches, Counter()
    for n in range(first, first + plan.num_batches):
        batch = plan[n]
        assert batch.epoch == epoch
        assert batch.images.shape == batch.weights.shape == (batch_size,)
        assert set(buckets.assignment[batch.images]) == {batch.bucket}
        assert batch.weights.dtype == np.float32
        seen.update(batch.images[batch.weights > 0].tolist())
    if tail == "pad":
        assert seen == Counter(range(len(assignment)))
    else:
        assert set(seen) == set(range(len(assignment)))
        assert sum(seen.values()) == plan.num_batches * batch_size


@given(ASSIGNMENTS, st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_drop_keeps_full_batches_only(assignment, batch_size):
    buckets = buckets_of(assignment)
    full = sum(count // batch_size for count in np.bincount(buckets.assignment))
    if full == 0:
        with pytest.raises(UserError, match="batch_size"):
            BatchPlan(buckets, batch_size, seed=0, name="d", tail="drop")
        return
    plan = BatchPlan(buckets, batch_size, seed=0, name="d", tail="drop")
    images = np.concatenate([plan[n].images for n in range(plan.num_batches)])
    assert len(set(images.tolist())) == len(images) == full * batch_size
    assert all(plan[n].weights.all() for n in range(plan.num_batches))


def stream(plan, ns):
    return [(b.bucket, b.images.tolist(), b.weights.tolist()) for b in (plan[n] for n in ns)]


@given(ASSIGNMENTS, st.permutations(range(30)))
@settings(max_examples=50, deadline=None)
def test_a_batch_follows_from_its_number_alone(assignment, order):
    def plan():
        return BatchPlan(buckets_of(assignment), 3, seed=5, name="d")

    shuffled = stream(plan(), order)
    forward = stream(plan(), range(30))
    assert shuffled == [forward[n] for n in order]


def test_seed_name_and_epoch_change_the_order():
    buckets = fixed_bucket([(64, 64)] * 50)

    def images(seed=0, name="d", epoch=0):
        return BatchPlan(buckets, 50, seed=seed, name=name)[epoch].images.tolist()

    orders = [images(), images(seed=1), images(name="e"), images(epoch=1), images(epoch=2)]
    assert len({tuple(order) for order in orders}) == 5
    assert images() == images()


def test_the_order_of_a_bucket_does_not_depend_on_the_batch_size():
    buckets = fixed_bucket([(64, 64)] * 24)

    def order(size):
        plan = BatchPlan(buckets, size, seed=0, name="d")
        parts = {tuple(plan[n].images.tolist()) for n in range(plan.num_batches)}
        whole = BatchPlan(buckets, 24, seed=0, name="d")[0].images.tolist()
        return parts == {tuple(whole[i : i + size]) for i in range(0, 24, size)}

    assert all(order(size) for size in (1, 2, 4, 8))


def test_shuffles_are_fair():
    """Every image is as often first as any other; 40 is 4 standard deviations of 100 draws."""
    plan = BatchPlan(fixed_bucket([(64, 64)] * 10), 10, seed=0, name="d")
    firsts = np.bincount([plan[epoch].images[0] for epoch in range(1000)], minlength=10)
    assert abs(firsts - 100).max() < 40


def test_the_order_is_the_same_for_ever():
    """A run resumed under another version of NumPy goes on in the same order."""
    plan = BatchPlan(fixed_bucket([(64, 64)] * 8), 8, seed=114514, name="dataset1")
    assert plan[3].images.tolist() == [4, 6, 7, 2, 5, 1, 3, 0]
