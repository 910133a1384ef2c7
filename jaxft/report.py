"""What becomes of the images of a data set: numbers of each bucket, warnings, and a page of it."""

import base64
import html
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from jaxft.data import source
from jaxft.data.buckets import Fit, Size, fit
from jaxft.data.loader import Dataset

MAX_LOST = 0.3
"""Share of an image that may be cropped away without a warning."""

MAX_SCALE = 1.5
"""By which an image may be enlarged without a warning."""

MOST_NAMED = 5
"""Images named in a warning."""

THUMBNAIL = 160
"""Pixels of a thumbnail's longer side."""

MOST_SHOWN, MOST_SHOWN_OF_BUCKET = 240, 12
"""Thumbnails of a page, and of one bucket."""


def bucket_lines(dataset: Dataset) -> list[str]:
    """A line for each bucket, for what is drawn, and for what last batches lack or leave out."""
    fitted, plan = _fit(dataset), dataset.plan
    lines = [
        f"{_text(size)}: {_bucket_line(dataset, fitted, bucket)}"
        for bucket, size in enumerate(dataset.buckets.sizes)
    ]
    if dataset.buckets.num_small:
        small = _count(dataset.buckets.num_small, "image")
        lines.append(f"no_upscale: {small} in smaller sizes, so as not to be enlarged")
    if mirrored := dataset.summary.num_flipped:
        lines.append(f"flip: {_count(mirrored, 'image')} mirrored half of the time")
    if drawn := dataset.summary.num_random:
        lines.append(f"crop: {_count(drawn, 'image')} cropped at random, anew in every epoch")
    if kept := dataset.summary.num_kept:
        lines.append(f"crop: {_count(kept, 'image')} cropped around what their masks show")
    if masked := dataset.summary.num_masked:
        lines.append(f"att_mask: {_count(masked, 'image')} of which the parts count as masks say")
    if seen := dataset.summary.num_conditioned:
        lines.append(f"cond_dir: {_count(seen, 'image')}, each with its conditioning image")
    if plan.num_dropped:
        lines.append(f"tail: {_count(plan.num_dropped, 'image')} dropped each epoch")
    if plan.num_filled and plan.tail == "pad":
        lines.append(f"tail: {_count(plan.num_filled, 'row')} of padding each epoch")
    if plan.num_filled and plan.tail == "resample":
        lines.append(f"tail: {_count(plan.num_filled, 'image')} drawn again each epoch")
    return lines


def warnings(dataset: Dataset) -> list[str]:
    """What the user should look at: images that lose much, are enlarged much, or are never used."""
    fitted, key = _fit(dataset), f"data.{dataset.name}"
    notices = []
    if lost := _worst(dataset, fitted.lost, MAX_LOST, lambda lost: f"{100 * lost:.0f} %"):
        notices.append(
            f"{key}: {_count(len(lost), 'image')} cropped by more than {100 * MAX_LOST:.0f} %: "
            f"{_named(lost)}; choose buckets that suit their shapes, or crop them yourself"
        )
    if grown := _worst(dataset, fitted.scale, MAX_SCALE, lambda scale: f"{scale:.1f}×"):
        notices.append(
            f"{key}: {_count(len(grown), 'image')} enlarged more than {MAX_SCALE:g}×: "
            f"{_named(grown)}; choose smaller buckets, a bucket's no_upscale: true, or leave them "
            "out"
        )
    for bucket, batches in enumerate(dataset.plan.batches_of_bucket):
        if not batches:
            members = np.flatnonzero(dataset.buckets.assignment == bucket).tolist()
            names = [_plain(dataset.records[image].path.name) for image in members]
            notices.append(
                f"{key}.tail: drop never uses {_count(len(names), 'image')}, fewer than a batch of "
                f"{_text(dataset.buckets.sizes[bucket])}: {_named(names)}; use pad"
            )
    return notices


def _fit(dataset: Dataset) -> Fit:
    return fit(dataset.summary.originals, dataset.buckets)


def _bucket_line(dataset: Dataset, fitted: Fit, bucket: int) -> str:
    members = dataset.buckets.assignment == bucket
    scale, padding = fitted.scale[members], fitted.padding[members]
    parts = [
        f"{_count(len(scale), 'image')} in "
        f"{_count(dataset.plan.batches_of_bucket[bucket], 'batch', 'batches')}",
        f"{100 * fitted.lost[members].mean():.1f} % cropped",
    ]
    if grown := int((scale > 1).sum()):
        parts.append(f"{grown} enlarged up to {scale.max():.2f}×")
    if padded := int((padding > 0).sum()):
        parts.append(f"{padded} padded up to {100 * padding.max():.0f} %")
    return ", ".join(parts)


def _worst(
    dataset: Dataset, values: np.ndarray, limit: float, text: Callable[[float], str]
) -> list[str]:
    """Names of images above a limit, each once, the worst first, with their values."""
    above = {}
    for image in np.argsort(-values, kind="stable").tolist():
        if values[image] <= limit:
            break
        path = dataset.records[image].path
        above.setdefault(path, f"{_plain(path.name)} ({text(float(values[image]))})")
    return list(above.values())


def _named(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _text(size: Size) -> str:
    return f"{size[0]} × {size[1]}"


def _plain(text: str) -> str:
    """The text in one line that UTF-8 can hold, whatever a file is called."""
    shown = (c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    return "".join(shown)


# Page -------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
pre { background: #8881; overflow-x: auto; padding: 1em; white-space: pre-wrap }
.images { display: flex; flex-wrap: wrap; gap: 1em }
figure { margin: 0; width: 160px }
figcaption { font-size: 12px; line-height: 1.35; overflow-wrap: anywhere }
figcaption b { display: block }
"""


def page(title: str, text: str, datasets: Sequence[Dataset]) -> str:
    """The report as one HTML page that needs nothing else: the text, and images of each bucket.

    Images are shown as they are trained, those first that lose most to the crop. Their number and
    size are bounded. No text of a file becomes markup, and nothing on the page can run.

    Raises:
        UserError: an image has changed since it was indexed.
    """
    buckets = sum(len(dataset.buckets.sizes) for dataset in datasets)
    most = min(MOST_SHOWN_OF_BUCKET, MOST_SHOWN // buckets)
    lines = "\n".join(_plain(line) for line in text.split("\n"))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{_escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{_escaped(title)}</h1>\n<pre>{html.escape(lines)}</pre>",
            *(part for dataset in datasets for part in _dataset_parts(dataset, most)),
            "</body>\n</html>\n",
        ]
    )


def _dataset_parts(dataset: Dataset, most: int) -> Iterable[str]:
    fitted = _fit(dataset)
    worst_first = np.argsort(-fitted.lost, kind="stable")
    yield f"<h2>{_escaped(dataset.name)}</h2>"
    for bucket, size in enumerate(dataset.buckets.sizes):
        members = worst_first[dataset.buckets.assignment[worst_first] == bucket].tolist()
        firsts: dict[Path, int] = {}
        for image in members:
            firsts.setdefault(dataset.records[image].path, image)
        shown = list(firsts.values())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            records = [dataset.records[image] for image in shown[:most]]
            pictures = list(pool.map(_thumbnail, records, [size] * len(records)))
        yield f"<h3>{_text(size)}</h3>\n<p>{_bucket_line(dataset, fitted, bucket)}"
        yield f"; {len(records)} of them:</p>" if len(shown) > most else "</p>"
        yield '<div class="images">'
        for image, record, picture in zip(shown, records, pictures, strict=False):
            told = [
                _text(record.size),
                f"{100 * fitted.lost[image]:.0f} % cropped",
                *([f"{fitted.scale[image]:.2f}×"] if fitted.scale[image] > 1 else []),
            ]
            yield (
                f'<figure>{picture}<figcaption><b title="{_escaped(str(record.path))}">'
                f"{_escaped(record.path.name)}</b>{', '.join(told)}<br>"
                f"{_escaped(source.prompt(record, 0))}</figcaption></figure>"
            )
        yield "</div>"


def _thumbnail(record: source.Record, size: Size) -> str:
    """The image as it is trained, made small, as an element."""
    image = Image.fromarray(source.pixels(record, size))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    data = base64.b64encode(stream.getvalue()).decode()
    width, height = image.size
    return f'<img alt="" width="{width}" height="{height}" src="data:image/jpeg;base64,{data}">'


def _escaped(text: str) -> str:
    return html.escape(_plain(text))
