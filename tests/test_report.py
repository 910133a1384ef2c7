"""What is told of a data set's buckets: the numbers are those of the files, the page is safe."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import random_model
from PIL import Image

from jaxft import planning, report
from jaxft.data import batches, buckets, loader, source
from jaxft.data.tokens import Tokenizer
from jaxft.errors import UserError
from tests.data_fixtures import photo_folder, photograph

EVIL = "<img src=x onerror=alert(1)>&amp;\"'\n.png"
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    random_model.write_tokenizer(folder)
    return Tokenizer(folder)


def dataset(folder: Path, tokenizer: Tokenizer, shaped=None, **options) -> loader.Dataset:
    records, _ = source.index(folder, repeat=options.pop("repeat", 1))
    records = [record._replace(captions=(f"</pre><b>{record.path.name}",)) for record in records]
    sizes = [record.size for record in records]
    shaped = shaped(sizes) if shaped else buckets.fixed_bucket(sizes, target_size=[64, 64])
    records = [record._replace(scaled=shaped.scaled) for record in records]
    plan_ = batches.BatchPlan(shaped, options.pop("batch_size", 2), seed=0, name="d", **options)
    return loader.Dataset("d", records, shaped, plan_, [tokenizer])


@pytest.fixture
def photos(tmp_path) -> Path:
    """Six photographs that a square of 64 crops by nothing, a third, a half; enlarged up to 2×."""
    sizes = [(64, 64), (96, 64), (64, 128), (128, 128), (32, 32), (40, 80)]
    for index, size in enumerate(sizes):
        photograph(index, size).save(tmp_path / f"{index}.png")
    return tmp_path


def test_numbers_are_those_of_the_images(photos, tokenizer):
    lost = 100 * (1 / 3 + 1 / 2 + 1 / 2) / 6
    (line,) = report.bucket_lines(dataset(photos, tokenizer))
    assert line == f"64 × 64: 6 images in 3 batches, {lost:.1f} % cropped, 2 enlarged up to 2.00×"
    cropped, grown = report.warnings(dataset(photos, tokenizer, repeat=3))
    assert (
        "3 images cropped by more than 30 %: 2.png (50 %), 5.png (50 %), 1.png (33 %);" in cropped
    )
    assert "2 images enlarged more than 1.5×: 4.png (2.0×), 5.png (1.6×);" in grown


def test_what_is_not_enlarged_is_counted(photos, tokenizer):
    def shaped(sizes):
        options = {"target_area": 64 * 64, "num_bucket": 1, "step_size": 32, "no_upscale": True}
        return buckets.ratio_buckets_from_files(sizes, **options)

    data = dataset(photos, tokenizer, shaped)
    lines = report.bucket_lines(data)
    assert "no_upscale: 2 images in smaller sizes, so as not to be enlarged" in lines
    assert lines[0].startswith("32 × 32: 2 images in 1 batch")
    assert not any("enlarged up to" in line for line in lines)
    assert not any("enlarged" in warning for warning in report.warnings(data))


def test_names_in_warnings_are_few(tmp_path, tokenizer):
    for index in range(7):
        photograph(index, (32 + index, 64)).save(tmp_path / f"{index}.png")
    cropped, grown = report.warnings(dataset(tmp_path, tokenizer))
    assert "7 images cropped" in cropped
    assert cropped.count(".png") == grown.count(".png") == 5
    assert "and 2 more" in cropped


@pytest.mark.parametrize(
    ("tail", "says"),
    [
        ("pad", "tail: 2 rows of padding each epoch"),
        ("resample", "tail: 2 images drawn again each epoch"),
        ("drop", "tail: 2 images dropped each epoch"),
    ],
)
def test_the_tail_is_counted(photos, tokenizer, tail, says):
    data = dataset(photos, tokenizer, tail=tail, batch_size=4)
    assert report.bucket_lines(data)[-1] == says
    drawn = [data.plan[n] for n in range(data.num_batches)]
    weights = np.concatenate([batch.weights for batch in drawn])
    assert abs(weights.sum() - 6) == {"pad": 0}.get(tail, 2)


def test_images_that_are_never_used_are_named(photos, tokenizer):
    def shaped(sizes):
        return buckets.Buckets([(64, 64), (64, 96)], np.array([0, 0, 1, 0, 0, 0]))

    data = dataset(photos, tokenizer, shaped, tail="drop")
    assert "64 × 96: 1 image in 0 batches" in report.bucket_lines(data)[1]
    assert any("drop never uses 1 image" in w and "2.png" in w for w in report.warnings(data))


def test_padding_is_told(photos, tokenizer):
    def shaped(sizes):
        return buckets.size_buckets_from_files(sizes, num_bucket=1, step_size=32)

    (line,) = report.bucket_lines(dataset(photos, tokenizer, shaped))  # their mean is 70.7 × 82.7
    assert line.startswith("64 × 96: 6 images in 3 batches")
    assert line.endswith("% cropped, 4 padded up to 83 %")  # of 32 × 32


class Page(HTMLParser):
    """Tags in order, their attributes, the images and the text of a page; tags must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def images(self) -> list[Image.Image]:
        prefix = "data:image/jpeg;base64,"
        sources = [value for name, value in self.attributes if name == "src"]
        assert all(value.startswith(prefix) for value in sources)
        data = [base64.b64decode(value.removeprefix(prefix), validate=True) for value in sources]
        return [Image.open(io.BytesIO(one), formats=["JPEG"]) for one in data]


def assert_safe(page: Page) -> None:
    assert set(page.tags) <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "pre", "p", "div"),
        *("figure", "figcaption", "img", "b", "br"),
    }
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "href"]
    assert any(
        n == "content" and str(v).startswith("default-src 'none'") for n, v in page.attributes
    )


def test_a_page_shows_the_images_as_they_are_trained(photos, tokenizer):
    data = dataset(photos, tokenizer, repeat=2)
    page = Page(report.page("a <b>title</b>", "some\n<i>text</i>", [data]))
    assert_safe(page)
    assert "a <b>title</b>" in page.texts
    assert "some\n<i>text</i>" in page.texts
    assert len(page.images) == 6
    names = [text for text in page.texts if re.fullmatch(r"\d\.png", text)]
    assert names == ["2.png", "5.png", "1.png", "0.png", "3.png", "4.png"]  # the worst first
    for name, image in zip(names, page.images, strict=True):
        (record,) = {r.path: r for r in data.records if r.path.name == name}.values()
        pixels = source.pixels(record, (64, 64)).astype(float)
        assert np.abs(np.asarray(image, float) - pixels).mean() < 8  # JPEG's loss


def test_nothing_of_a_file_becomes_markup(tmp_path, tokenizer):
    evil = tmp_path / EVIL
    # `/` cannot be in a name; bytes that are no UTF-8 can.
    photograph(0, (64, 48)).save(evil, "PNG")
    photograph(1, (64, 48)).save(tmp_path / "\udcff\u202e.png", "PNG")
    data = dataset(tmp_path, tokenizer)
    text = report.page("t", "\n".join(report.warnings(data) + report.bucket_lines(data)), [data])
    text.encode("utf-8")
    page = Page(text)
    assert_safe(page)
    assert len(page.images) == 2
    assert EVIL.replace("\n", " ") in page.texts


def test_a_page_is_bounded(tmp_path, tokenizer):
    photo_folder(tmp_path / "photos", 40, captions=False)
    photograph(0, (2000, 1000)).save(tmp_path / "photos" / "large.png")

    def shaped(sizes):
        return buckets.fixed_bucket(sizes, target_size=[1024, 512])

    page = Page(report.page("t", "", [dataset(tmp_path / "photos", tokenizer, shaped)]))
    assert len(page.images) == report.MOST_SHOWN_OF_BUCKET
    assert all(max(image.size) == report.THUMBNAIL for image in page.images)
    assert "; 12 of them:" in "".join(page.texts)


def test_the_plan_is_written_as_a_page(tmp_path, capsys):
    config = "configs/train/examples/demo.yaml"
    file = tmp_path / "plan.html"
    assert planning.main(["--config", config, "--html", str(file)]) == 0
    page = Page(file.read_text("utf-8"))
    assert_safe(page)
    assert capsys.readouterr().out.strip() in (text.strip() for text in page.texts)
    assert 10 < len(page.images) <= report.MOST_SHOWN
    assert file.stat().st_size < 3_000_000
    for wrong in (tmp_path, tmp_path / "none" / "plan.html"):
        with pytest.raises(UserError, match="--html"):
            planning.main(["--config", config, "--html", str(wrong)])
