"""A folder of generated images: their names, and the settings that they carry."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

MAX_NAME_BYTES = 200
NUMBERED = re.compile(r"(\d+)-\d+-.")


def next_number(folder: Path) -> int:
    """One more than the highest number of an image here; 0 for a new folder.

    Images are named `number-seed-prompt`; other files do not count.
    """
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    numbers = [int(found[1]) for name in names if (found := NUMBERED.match(name))]
    return max(numbers, default=-1) + 1


def image_name(number: int, seed: int, prompt: str, image_type: str) -> str:
    """`number-seed-prompt.type`, safe on every file system, at most 200 bytes."""
    start, end = f"{number}-{seed}-", f".{image_type}"
    safe = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", prompt).strip(" .") or "_"
    room = MAX_NAME_BYTES - len(start) - len(end)
    return start + safe.encode()[:room].decode(errors="ignore").rstrip(" .") + end


def parameters(prompt: str, negative_prompt: str, settings: Mapping[str, Any]) -> str:
    """Settings in the form that AUTOMATIC1111's webui writes and other programs read."""
    lines = [prompt, f"Negative prompt: {negative_prompt}"] if negative_prompt else [prompt]
    values = {key: str(value) for key, value in settings.items()}
    quoted = {key: f'"{v}"' if "," in v or ":" in v else v for key, v in values.items()}
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in quoted.items())])


def write_image(
    path: Path, pixels: UInt8[np.ndarray, "h w 3"], texts: Mapping[str, str], quality: int
) -> None:
    """Writes one image, whole or not at all, in the format of its suffix.

    Args:
        path: `.png`, `.jpg` or `.webp`; its folder exists.
        pixels: what to write.
        texts: entries that a PNG carries along; other formats have no place for them.
        quality: 1 to 100, of the lossy formats.
    """
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    options: dict[str, Any] = {"pnginfo": info} if path.suffix == ".png" else {"quality": quality}
    temporary = path.with_name(f".{os.getpid()}.tmp{path.suffix}")
    try:
        Image.fromarray(pixels).save(temporary, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
