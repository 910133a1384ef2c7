import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from jaxft.data.buckets import fixed_bucket, ratio_buckets_from_files
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
