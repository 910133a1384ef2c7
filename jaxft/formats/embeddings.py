"""Files of embeddings: words learnt by textual inversion, Gal et al. 2022
(https://arxiv.org/abs/2208.01618).

A word is an array [n, d]: it takes n positions of a prompt, and d is the width of the model's text
encoder; of Stable Diffusion XL's two, both widths side by side. Which word it is, the name of the
file says.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft import params, tensor_file
from jaxft.errors import UserError
from jaxft.formats import published
from jaxft.formats.diffusers_folder import Configs
from jaxft.formats.families import Family

XL_KEYS = ("clip_l", "clip_g")
FORMS = (XL_KEYS, ("string_to_param.*",), ("emb_params",))
"""Keys that say what a file is: XL's pair; AUTOMATIC1111's pickles; kohya's and ours,
HCP-Diffusion's pickles. The one tensor of a file may have any key (diffusers': the word)."""

BOOKKEEPING = frozenset({"string_to_token.*"})
"""Beside the word in the first pickles of textual inversion."""

OUTPUT = "_out"
"""End of the keys under which OneTrainer keeps what it adds to the text encoder's output."""

PICKLED = (".pt", ".bin")


class Kind(NamedTuple):
    """The models that an embedding is for."""

    family: Family
    widths: tuple[int, ...]
    """Of each text encoder."""


def widths(configs: Configs) -> tuple[int, ...]:
    """Widths of a model's text encoders, in the order in which their states are joined."""
    return tuple(configs.parts[part]["hidden_size"] for part in configs.family.text_encoders)


KINDS = {
    sum(widths(configs)): Kind(configs.family, widths(configs))
    for configs in (published.SD15, published.SD21, published.SDXL)
}
"""Width of a word's array -> for which models it is."""


def keys_of(stored: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """Keys of the tensors that, side by side, are the word.

    Raises:
        UserError: there are none, or there are other tensors too.
    """
    rest = stored.keys() - BOOKKEEPING
    inputs = sorted(key for key in rest if not key.endswith(OUTPUT))
    keys = next((form for form in FORMS if rest.issuperset(form)), tuple(inputs[:1]))
    others = sorted(rest.difference(keys))
    if outputs := [key for key in others if key.endswith(OUTPUT)]:
        raise UserError(
            f"{source}: {outputs[0]} is added to the text encoder's output, which only OneTrainer "
            f"does; leave it out with `{command(source)}`"
        )
    if others or not keys:
        told = f"it holds {', '.join([*keys, *others][:3])} …" if keys else "it is empty"
        raise UserError(f"{source}: no embedding of a word, which is one tensor or a pair; {told}")
    return keys


def command(source: str) -> str:
    """What to run to have a file in our form."""
    return (
        f"jaxft convert embedding {source} --save_path {Path(source).with_suffix('.safetensors')}"
    )


def from_tensors(stored: Mapping[str, Any], source: str) -> np.ndarray:
    """A word's rows [n, d], float32, from what a file holds; one row may have one axis.

    Raises:
        UserError: it holds no embedding.
    """
    keys = keys_of(stored, source)
    arrays = [np.atleast_2d(np.asarray(stored[key]).astype(np.float32)) for key in keys]
    shapes = [array.shape for array in arrays]
    if {len(shape) for shape in shapes} != {2} or len({len(array) for array in arrays}) != 1:
        told = ", ".join(f"{key} {shape}" for key, shape in zip(keys, shapes, strict=True))
        raise UserError(f"{source}: no rows of an embedding: {told}")
    rows = np.concatenate(arrays, axis=1)
    if not len(rows) or not np.isfinite(rows).all():
        raise UserError(f"{source}: its rows are not made of numbers; was the training cut off?")
    return rows


def kind(width: int, source: str) -> Kind:
    """For which models an array of this width is; raises UserError where there are none."""
    if width not in KINDS:
        known = ", ".join(f"{wide} ({made.family.title})" for wide, made in KINDS.items())
        raise UserError(f"{source}: this embedding is {width} wide; we know {known}")
    return KINDS[width]


def describe(rows: int, width: int) -> str:
    """A word's array in words: rows and family."""
    found = KINDS.get(width)
    made_for = f"for {found.family.title}" if found else f"{width} wide"
    return f"{rows} row{'' if rows == 1 else 's'}, {made_for}"


def shape(tensors: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and width of the embedding that tensors (or their entries in a header) are, if any."""
    try:
        keys = keys_of({key: None for key in tensors if not key.endswith(OUTPUT)}, "")
    except UserError:
        return None
    shapes = [tensors[key].shape for key in keys]
    if any(len(shape) not in (1, 2) for shape in shapes):
        return None
    width = sum(shape[-1] for shape in shapes)
    rows = shapes[0][0] if len(shapes[0]) == 2 else 1
    return (rows, width) if keys in FORMS or width in KINDS else None


def check(rows: np.ndarray, expected: Sequence[int], source: str) -> None:
    """Raises UserError unless rows are as wide as a model's text encoders."""
    width = rows.shape[1]
    if width != sum(expected):
        found = KINDS.get(width)
        made_for = f"of {found.family.title}" if found else "of no model that we know"
        needed = " + ".join(map(str, expected))
        raise UserError(
            f"{source}: this embedding is {width} wide, {made_for}; the model's text encoder"
            f"{'s are' if len(expected) > 1 else ' is'} {needed} wide"
        )


def read_folder(folder: Path, expected: Sequence[int]) -> dict[str, np.ndarray]:
    """Word -> its rows [n, d], of all embeddings in a folder, in the order of their names.

    Raises:
        UserError: there is no such folder, it has no embeddings, or one is damaged, pickled or of
            another width than `expected`, that of the model's text encoders.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of embeddings")
    files = sorted(folder.glob("*.safetensors"))
    stems = {path.stem for path in files}
    pickled = [p for p in sorted(folder.iterdir()) if p.suffix in PICKLED and p.stem not in stems]
    if pickled:
        commands = "\n".join(f"  {command(str(path))}" for path in pickled)
        raise UserError(f"{folder}: pickles are not opened here; convert them first:\n{commands}")
    if not files:
        raise UserError(f"{folder}: there are no embeddings in it (WORD.safetensors)")
    words = {path.stem: from_tensors(tensor_file.read(path), str(path)) for path in files}
    for path, rows in zip(files, words.values(), strict=True):
        check(rows, expected, str(path))
    return words


def write(
    path: Path,
    rows: np.ndarray,
    expected: Sequence[int],
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a word as webuis, kohya's trainer and diffusers read it.

    Args:
        path: the file; its name is the word.
        rows: [n, sum of `expected`].
        expected: widths of the model's text encoders: one makes `emb_params`, two XL's pair.
        dtype: `fp32`, `fp16` or `bf16`; None: as they are.
        metadata: texts for the header.
    """
    keys = XL_KEYS if len(expected) > 1 else ("emb_params",)
    stored: dict[str, np.ndarray] = dict(zip(keys, split(rows, expected), strict=True))
    tensor_file.write(path, stored, metadata, dtype and params.DTYPES[dtype])


def split(rows: np.ndarray, expected: Sequence[int]) -> list[np.ndarray]:
    """The columns of each text encoder, [n, width]."""
    return np.split(rows, np.cumsum(expected)[:-1], axis=1)
