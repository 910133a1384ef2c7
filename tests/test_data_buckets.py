from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from jaxft.data.buckets import BatchPlan, Buckets, fixed_bucket, ratio_buckets_from_files
from jaxft.errors import UserError

SIDES = st.integers(200, 4000)
IMAGES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=40)


@given(sizes=IMAGES, data=st.data(), step=st.sampled_from([8, 64]))
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_buckets_are_hcp_diffusions(sizes, data, step):
    """Each image has the size that its KMeans centre gives by the original's formula."""
    count = data.draw(st.integers(1, min(len(sizes), 6)))
    area = 512 * 768
    buckets = ratio_buckets_from_files(sizes, target_area=area, step_size=step, num_bucket=count)
    ratios = np.log2([[width / height] for width, height in sizes])
    model = KMeans(n_clusters=count, random_state=3407, tol=1e-3).fit(ratios)
    for image, label in enumerate(np.asarray(model.labels_)):
        ratio = 2 ** model.cluster_centers_[label, 0]
        height = np.sqrt(area / ratio)
        expected = np.round(np.array([height * ratio, height]) / step) * step
        assert buckets.sizes[buckets.assignment[image]] == tuple(expected.astype(int).tolist())
    assert len(set(buckets.sizes)) == len(buckets.sizes)
    assert set(buckets.assignment.tolist()) == set(range(len(buckets.sizes)))


def test_like_ratios_are_one_bucket():
    buckets = ratio_buckets_from_files([(100, 100)] * 5, target_area=512 * 512, num_bucket=5)
    assert buckets.sizes == [(512, 512)]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_bucket": 4}, "num_bucket: 4 buckets for 3 images"),
        ({"num_bucket": 0}, "num_bucket"),
        ({"num_bucket": 1, "step_size": 12}, "step_size"),
        ({"num_bucket": 1, "step_size": 0}, "step_size"),
        ({"num_bucket": 1, "target_area": 512}, "target_area"),
        ({"num_bucket": 1, "target_area": 10**9}, "target_area"),
        ({"num_bucket": 3, "target_area": 512 * 512}, "60000x1"),
    ],
)
def test_options_that_give_no_bucket_are_named(options, key):
    with pytest.raises(UserError, match=key):
        ratio_buckets_from_files([(640, 480), (60000, 1), (512, 512)], **options)


def test_fixed_bucket():
    sizes = [(10, 20), (30, 40)]
    assert fixed_bucket(sizes).sizes == [(512, 512)]
    assert fixed_bucket(sizes, target_size=[512, 768]).sizes == [(512, 768)]
    assert fixed_bucket(sizes).assignment.tolist() == [0, 0]
    for wrong in (500, [512], [512, 0], [512, 1 << 20], [512.5, 512]):
        with pytest.raises(UserError, match="target_size"):
            fixed_bucket(sizes, target_size=wrong)


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
