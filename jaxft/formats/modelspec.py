"""What our files say of themselves in their headers, in the words of others.

ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec) for all, and kohya's keys (`ss_…`) for
what was trained. Headers travel with files, so nothing of the machine or its user gets into them:
no paths, no account, no whole captions.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from jaxft.formats.diffusers_folder import Configs

MOST_TAGS, LONGEST_TAG = 200, 48
"""Tags in a header, and characters of one: longer ones are sentences, not tags."""

CARRIED = (
    *("modelspec.author", "modelspec.date", "modelspec.description", "modelspec.license"),
    *("modelspec.merged_from", "modelspec.tags", "modelspec.trigger_phrase"),
    *("modelspec.usage_hint", "ss_tag_frequency"),
)
"""What stays true of a file in another form."""


def header(configs: Configs, title: str, kind: str = "") -> dict[str, str]:
    """The keys that ModelSpec requires; the writer of the file fills in the hash.

    Args:
        configs: of the model, or of the model that the file belongs to.
        title: for people.
        kind: what it is instead of a whole model: `lora`, `controlnet`.
    """
    is_v = configs.scheduler.get("prediction_type") == "v_prediction"
    architecture = configs.family.modelspec(is_v)
    scale = 2 ** (len(configs.parts["vae"]["block_out_channels"]) - 1)
    size = scale * configs.parts["unet"].get("sample_size", 64)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}" if kind else architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "modelspec.hash_sha256": "",
    }


def training(
    *, base: str, captions: Iterable[str], words: Iterable[str], settings: Mapping[str, Any]
) -> dict[str, str]:
    """What training adds: the date, the words that call up what was learned, tags, settings.

    Args:
        base: name or path of the model that was trained; only its last part is told.
        captions: of all images; tags are what stands between their commas.
        words: that stand for what was learned.
        settings: kohya's name without `ss_` -> value.
    """
    texts = {
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ss_sd_model_name": PurePath(base.rstrip("/")).name,
    }
    if phrase := ", ".join(dict.fromkeys(words)):
        texts["modelspec.trigger_phrase"] = phrase
    tags = (tag.strip() for caption in captions for tag in caption.split(","))
    counted = Counter(tag for tag in tags if 0 < len(tag) <= LONGEST_TAG)
    if counted:
        most = dict(counted.most_common(MOST_TAGS))
        texts["modelspec.tags"] = ", ".join([*most][:10])
        texts["ss_tag_frequency"] = json.dumps({"train": most}, ensure_ascii=False)
    return texts | {f"ss_{name}": str(value) for name, value in settings.items()}


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """Of a file's header, what stays true when the file is written in another form."""
    return {key: metadata[key] for key in CARRIED if key in metadata}
