from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from jaxft.data.buckets import (
    Buckets,
    Size,
    fit,
    fixed_bucket,
    long_edge_buckets_from_files,
    ratio_buckets_from_files,
    ratio_buckets_from_ratios,
    ratio_size_buckets_from_files,
    size_buckets_from_files,
)
from jaxft.data.images import crop_and_pad
from jaxft.errors import UserError
from tests.data_fixtures import photograph

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


def generated(count: int) -> list[Size]:
    """Sizes as cameras, scanners and croppers leave them: some shapes often, others once."""
    rng = np.random.default_rng(7)
    usual = np.array([(3, 2), (2, 3), (4, 3), (3, 4), (1, 1), (16, 9), (9, 16)])
    sides = usual[rng.integers(len(usual), size=count)] * rng.integers(60, 300, (count, 1))
    odd = rng.random(count) < 0.5
    sides[odd] = rng.integers(200, 4000, (odd.sum(), 2))
    return [(width, height) for width, height in sides.tolist()]


def trained(buckets: Buckets) -> list[Size]:
    return [buckets.sizes[bucket] for bucket in buckets.assignment.tolist()]


def original(centres: np.ndarray, labels: np.ndarray, step: int = 8) -> list[Size]:
    """Each image's size, from KMeans' centres: the original's rounding."""
    sizes = (np.round(centres / step) * step).astype(int)
    return [tuple(sizes[label].tolist()) for label in labels]


def from_ratios_and_areas(ratios: np.ndarray, areas: np.ndarray | float) -> np.ndarray:
    heights = np.sqrt(areas / ratios)
    return np.stack([heights * ratios, heights], axis=1)


@pytest.mark.parametrize("num_bucket", [1, 5, 10])
def test_500_images_have_the_clusters_and_sizes_of_hcp_diffusion(num_bucket):
    sizes, area = generated(500), 512 * 768
    buckets = ratio_buckets_from_files(sizes, target_area=area, step_size=8, num_bucket=num_bucket)
    ratios = np.log2(np.array([w / h for w, h in sizes])).reshape(-1, 1)
    model = KMeans(n_clusters=num_bucket, random_state=3407, tol=1e-3).fit(ratios)
    centres = from_ratios_and_areas(2 ** model.cluster_centers_.reshape(-1), area)
    assert trained(buckets) == original(centres, model.labels_)
    clusters = Counter(np.asarray(model.labels_).tolist()).values()
    assert sorted(np.bincount(buckets.assignment).tolist()) == sorted(clusters)


def test_the_other_kinds_are_hcp_diffusions_too():
    sizes = generated(500)
    array = np.array(sizes)

    def kmeans(features):
        model = KMeans(n_clusters=6, random_state=3407).fit(features)
        return model.cluster_centers_, model.labels_

    ours = size_buckets_from_files(sizes, step_size=8, num_bucket=6)
    assert trained(ours) == original(*kmeans(array))
    assert not ours.scaled

    areas = [min(w * h, 640 * 640) for w, h in sizes]
    centres, labels = kmeans(np.log2([[w / h, a] for (w, h), a in zip(sizes, areas, strict=True)]))
    wanted = from_ratios_and_areas(2 ** centres[:, 0], 2 ** centres[:, 1])
    ours = ratio_size_buckets_from_files(sizes, step_size=8, num_bucket=6)
    assert trained(ours) == original(wanted, labels)

    scales = [768 / max(size) for size in sizes]
    scaled = [(round(w * s), round(h * s)) for (w, h), s in zip(sizes, scales, strict=True)]
    ours = long_edge_buckets_from_files(sizes, target_edge=768, step_size=8, num_bucket=6)
    assert trained(ours) == original(*kmeans(np.array(scaled)))


@pytest.mark.parametrize(("step", "num_bucket"), [(8, 10), (64, 7)])
def test_buckets_from_ratios_are_hcp_diffusions(step, num_bucket):
    sizes, area, ratio_max = generated(500), 512 * 512, 4
    low = int(np.sqrt(area / ratio_max))
    sides = range(low // step * step, int(ratio_max * low) // step * step + 1, step)
    grid = sorted(((w, h) for w in sides for h in sides), key=lambda s: abs(s[0] * s[1] - area))
    grid = np.array(grid[: 3 * num_bucket])
    ratios = np.log2(grid[:, 0] / grid[:, 1])
    labels = KMeans(n_clusters=num_bucket, random_state=3407).fit(ratios[:, None]).labels_
    table = []
    for label in range(num_bucket):
        held = grid[labels == label]
        of = np.log2(held[:, 0] / held[:, 1])
        table.append(tuple(held[np.abs(of - np.median(of)).argmin()].tolist()))
    wanted = [
        min(table, key=lambda bucket: abs(np.log2(bucket[0] / bucket[1]) - np.log2(w / h)))
        for w, h in sizes
    ]
    options = {"target_area": area, "step_size": step, "num_bucket": num_bucket}
    assert trained(ratio_buckets_from_ratios(sizes, **options)) == wanted
    few = ratio_buckets_from_ratios(sizes[:3], **options)  # they do not depend on the images
    assert trained(few) == wanted[:3]


def test_ratios_have_limits():
    ratios = [
        width / height
        for width, height in ratio_buckets_from_ratios(
            generated(300), target_area=512 * 512, num_bucket=5, ratio_min=0.5, ratio_max=1.5
        ).sizes
    ]
    assert min(ratios) >= 0.5
    assert max(ratios) <= 1.5


@given(sizes=IMAGES, ratios=st.booleans())
@settings(max_examples=40, deadline=None)
def test_of_several_areas_an_image_gets_the_largest_that_it_fills(sizes, ratios):
    areas = [1024 * 1024, 384 * 384, 640 * 640]
    kind = ratio_buckets_from_ratios if ratios else ratio_buckets_from_files
    options = {"step_size": 8, "num_bucket": 6 if ratios else min(len(sizes), 3)}
    single = [trained(kind(sizes, target_area=area, **options)) for area in sorted(areas)]
    for size, chosen, choices in zip(
        sizes,
        trained(kind(sizes, target_area=areas, **options)),
        zip(*single, strict=True),
        strict=True,
    ):
        filled = [c for c in choices if c[0] <= size[0] and c[1] <= size[1]]
        assert chosen == (filled[-1] if filled else choices[0])


@given(sizes=IMAGES)
@settings(max_examples=30, deadline=None)
def test_known_sizes_stay_and_each_image_gets_the_nearest(sizes):
    """Nothing is fitted: more buckets than images are no error; a size is nearest to itself."""
    known = [(512, 512), (384, 640), (640, 384)]
    kinds = {
        ratio_buckets_from_files: {"target_area": 500 * 500},
        ratio_buckets_from_ratios: {"target_area": 500 * 500},
        size_buckets_from_files: {},
        ratio_size_buckets_from_files: {},
        long_edge_buckets_from_files: {"target_edge": 640},
    }
    for kind, options in kinds.items():
        buckets = kind(sizes + known, known=known, num_bucket=1000, **options)
        assert set(buckets.sizes) <= set(known)
        if kind is not long_edge_buckets_from_files:  # where squares are 640 × 640
            assert trained(buckets)[-3:] == known
    nearest = trained(ratio_buckets_from_files(sizes, known=known, target_area=500 * 500))
    for (width, height), chosen in zip(sizes, nearest, strict=True):
        ratio = np.log2(width / height)
        apart = [abs(np.log2(w / h) - ratio) for w, h in known]
        assert abs(np.log2(chosen[0] / chosen[1]) - ratio) == min(apart)


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


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (ratio_buckets_from_files, {"target_area": []}, "target_area: an empty list"),
        (ratio_buckets_from_files, {"target_area": [512 * 512, 3]}, "target_area: 3 must"),
        (ratio_buckets_from_ratios, {"ratio_max": 0.5}, "ratio_max: 0.5"),
        (ratio_buckets_from_ratios, {"ratio_min": 0}, "ratio_min"),
        (ratio_buckets_from_ratios, {"ratio_min": 5.0}, "ratio_min"),
        (ratio_buckets_from_ratios, {"num_bucket": 0}, "num_bucket: 0 buckets"),
        (ratio_buckets_from_ratios, {"num_bucket": 500}, "num_bucket: 500 buckets"),
        (size_buckets_from_files, {"num_bucket": 4}, "num_bucket: 4 buckets for 3 images"),
        (size_buckets_from_files, {"num_bucket": 3}, "step_size: nothing is left.* 30x400"),
        (size_buckets_from_files, {"step_size": 12}, "step_size: 12"),
        (ratio_size_buckets_from_files, {"max_area": 5}, "max_area: 5"),
        (long_edge_buckets_from_files, {"target_edge": 0}, "target_edge: 0"),
        (
            long_edge_buckets_from_files,
            {"target_edge": 64, "num_bucket": 3},
            "target_edge: nothing",
        ),
    ],
)
def test_the_other_kinds_name_their_options(kind, options, says):
    with pytest.raises(UserError, match=says):
        kind([(640, 480), (30, 400), (512, 512)], **options)


def test_fixed_bucket():
    sizes = [(10, 20), (30, 40)]
    assert fixed_bucket(sizes).sizes == [(512, 512)]
    assert fixed_bucket(sizes, target_size=[512, 768]).sizes == [(512, 768)]
    assert fixed_bucket(sizes).assignment.tolist() == [0, 0]
    for wrong in (500, [512], [512, 0], [512, 1 << 20], [512.5, 512]):
        with pytest.raises(UserError, match="target_size"):
            fixed_bucket(sizes, target_size=wrong)


# What becomes of images ---------------------------------------------------------------------------


@given(sizes=IMAGES)
@settings(max_examples=40, deadline=None)
def test_what_is_cropped_and_what_is_padded_adds_up(sizes):
    """Every pixel of the training image is of the image, scaled, or padding."""
    fixed = fixed_bucket(sizes, target_size=[512, 768])
    for buckets in (fixed, fixed._replace(scaled=False)):
        fitted = fit(sizes, buckets)
        kept = (1 - fitted.lost) * np.prod(sizes, axis=1) * fitted.scale**2
        np.testing.assert_allclose(kept, (1 - fitted.padding) * 512 * 768, rtol=1e-9)
        assert ((fitted.lost >= 0) & (fitted.lost < 1) & (fitted.padding >= 0)).all()
    assert not fit(sizes, fixed).padding.any()


def test_a_portrait_loses_a_third_in_a_square():
    fitted = fit([(1000, 1500), (256, 512)], fixed_bucket([(1, 1)] * 2))
    np.testing.assert_allclose(fitted.scale, [0.512, 2])
    np.testing.assert_allclose(fitted.lost, [1 / 3, 1 / 2])


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (128, 128), (40, 200)])
def test_unscaled_images_are_cropped_and_padded_as_by_pillow(size):
    image = photograph(1, (96, 64))
    left, top = (
        max(given - wanted, 0) // 2 for given, wanted in zip(image.size, size, strict=True)
    )
    theirs = image.crop((left, top, left + size[0], top + size[1]))  # black beyond the image
    np.testing.assert_array_equal(crop_and_pad(image, size), np.array(theirs))


@given(sizes=IMAGES, step=st.sampled_from([8, 64]), data=st.data())
@settings(max_examples=15, deadline=None)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_without_enlarging_a_small_image_has_the_largest_size_of_its_shape_in_it(sizes, step, data):
    """Other images have the size that they had; known sizes give the same."""
    make, options = data.draw(
        st.sampled_from(
            [
                (ratio_buckets_from_files, {"target_area": 1024**2, "num_bucket": 1}),
                (ratio_buckets_from_ratios, {"target_area": [512**2, 1536**2], "num_bucket": 4}),
                (ratio_size_buckets_from_files, {"max_area": 1024**2, "num_bucket": 1}),
                (long_edge_buckets_from_files, {"target_edge": 1024, "num_bucket": 1}),
            ]
        )
    )
    options = options | {"step_size": step}
    try:
        free = make(sizes, **options)
        bound = make(sizes, **options, no_upscale=True)
    except UserError:  # nothing is left of a strip
        assume(False)
    assert (fit(sizes, bound).scale <= 1).all()
    small = fit(sizes, free).scale > 1
    assert bound.num_small == small.sum()
    for image, before, after, grows in zip(
        sizes, trained(free), trained(bound), small, strict=True
    ):
        scale = min(1, *(given / side for given, side in zip(image, before, strict=True)))
        assert grows == (scale < 1)
        for side, wanted in zip(after, before, strict=True):
            assert side % step == 0
            assert wanted * scale - step < side <= wanted * scale + 1e-6
