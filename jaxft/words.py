"""Words of textual inversion, Gal et al. 2022 (https://arxiv.org/abs/2208.01618), as training has
them: which there are, how new ones begin, and whether prompts say them.

A word is an array [n, d]: it takes n places of a prompt, d is the width of the model's text
encoders together. Training moves these rows alone, never the table of tokens.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jaxft.config import Config
from jaxft.data import prompts
from jaxft.data.loader import Dataset
from jaxft.data.tokens import Tokenizer
from jaxft.diffusion.conditioning import TOKEN_TABLE
from jaxft.errors import UserError
from jaxft.formats import embeddings
from jaxft.formats.diffusers_folder import Model
from jaxft.tuning.groups import Group

PART = "words"
"""The part of what is trained that words are."""

USUAL_FOLDER = "embs/"
"""`emb_dir` unless told otherwise; it need not exist."""

RESERVED = ("unet", "text_encoder")
"""Names of other files in `ckpts/`."""

RANDOM = re.compile(r"\*\[([^\]]*)\]")
"""`*[0.017, 3]`: standard deviation and number of rows (1 unless given)."""


class Words(NamedTuple):
    """All words that a run's prompts may say."""

    rows: dict[str, np.ndarray]
    """Word -> its rows [n, d] before step 1, float32."""
    groups: dict[str, Group]
    """Word that is trained -> its group."""
    notices: list[str]

    @property
    def trained(self) -> dict[str, np.ndarray]:
        """The rows that training moves."""
        return {word: self.rows[word] for word in self.groups}

    @property
    def frozen(self) -> dict[str, np.ndarray]:
        """The rows of the other words."""
        return {word: rows for word, rows in self.rows.items() if word not in self.groups}


def read(
    options: Config,
    model: Model,
    *,
    factor: float = 1.0,
    seed: int = 0,
    begun: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Words:
    """The words of `emb_dir` and those that `train` names.

    Args:
        options: `tokenizer_pt` of the configuration.
        model: whose text encoders read them.
        factor: of all rates.
        seed: of rows that begin at random.
        begun: word -> the rows that it begins with, whatever `options` say.

    Raises:
        UserError: a file does not fit the model, or a word to train begins nowhere.
    """
    if options.replace and not (options.emb_dir and options.train):
        raise UserError(
            "tokenizer_pt.replace: give emb_dir and a word to train, or set it to false"
        )
    rows, notices = _folder(options.emb_dir, model)
    groups: dict[str, Group] = {}
    for key, entry in options.train.items():
        name, where = entry.name, f"tokenizer_pt.train.{key}"
        if Path(name).name != name or name.startswith(".") or name in RESERVED:
            raise UserError(f"{where}.name: {name!r} can name no file in ckpts/; choose another")
        if name in groups:
            raise UserError(f"{where}.name: {groups[name].name} trains {name!r} already")
        if name in begun:
            rows[name] = begun[name]
        elif entry.init_text is not None:
            if name in rows:
                notices.append(f"{where}: {name} begins as its init_text, not as in emb_dir")
            try:
                rows[name] = create(model, name, entry.init_text, entry.n_word, seed=seed)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        elif name not in rows:
            raise UserError(
                f"{where}.name: there is no {name}.safetensors in {options.emb_dir}; say how the "
                f"word begins, such as init_text: '*[0.017, 4]', or create it first: jaxft convert "
                f"create-embedding MODEL {name} 4 --root {options.emb_dir or USUAL_FOLDER}"
            )
        if entry.n_word not in (None, len(rows[name])):
            raise UserError(
                f"{where}.n_word: the file of {name!r} has {len(rows[name])} rows; leave n_word "
                "out, or give init_text"
            )
        groups[name] = Group(where, PART, (name,), entry.lr * factor, {**entry.optimizer})
    return Words(rows, groups, notices)


def _folder(emb_dir: str | None, model: Model) -> tuple[dict[str, np.ndarray], list[str]]:
    """The words of a folder, if there is one, and notices."""
    folder = Path(emb_dir).expanduser() if emb_dir else None
    known = (".safetensors", *embeddings.PICKLED)
    if not folder:
        return {}, []
    if not folder.is_dir() or not any(path.suffix in known for path in folder.iterdir()):
        usual = emb_dir == USUAL_FOLDER
        return {}, [] if usual else [f"tokenizer_pt.emb_dir: there are no words in {emb_dir}"]
    try:
        return embeddings.read_folder(folder, embeddings.widths(model.configs)), []
    except UserError as error:
        raise UserError(f"tokenizer_pt.emb_dir: {error}") from None


def create(
    model: Model, name: str, init_text: str, count: int | None = None, *, seed: int = 0
) -> np.ndarray:
    """Rows [n, d] for a new word, float32: those of a text's tokens, and random ones.

    Args:
        model: whose tokens they are.
        name: of the word; random rows are drawn from the seed and the name.
        init_text: such as `a cat *[0.017, 2]`: the rows of its tokens, then two of normal numbers
            with the standard deviation 0.017.
        count: rows to keep, the first ones; None: all.
        seed: of what is random.

    Raises:
        UserError: `init_text` makes no rows, or fewer than `count`, or a `*[…]` has no sense.
    """
    widths = embeddings.widths(model.configs)
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    pieces: list[np.ndarray] = []
    for position, piece in enumerate(RANDOM.split(init_text)):
        if position % 2:
            std, number = _numbers(piece)
            pieces.append(std * random.standard_normal((number, sum(widths)), np.float32))
        else:
            pieces.append(_of_tokens(model, piece))
    rows = np.concatenate(pieces, dtype=np.float32)
    if len(rows) < (count or 1):
        raise UserError(
            f"init_text: {init_text!r} makes {len(rows)} of {count or 1} rows; add a word, or rows "
            "of random numbers, such as *[0.017, 3]"
        )
    return rows[:count]


def _numbers(text: str) -> tuple[np.float32, int]:
    std, _, number = text.partition(",")
    try:
        found = np.float32(std), int(number or 1)
    except ValueError:
        found = np.float32(np.nan), 0
    if not found[0] >= 0 or not np.isfinite(found[0]) or found[1] < 1:
        raise UserError(
            f"init_text: *[{text}] must be a standard deviation and a number of rows, as "
            "*[0.017, 3]"
        )
    return found


def _of_tokens(model: Model, text: str) -> np.ndarray:
    """The rows of a text's tokens, of all text encoders side by side."""
    columns = [
        np.asarray(model.parts[part].params[TOKEN_TABLE], np.float32)[Tokenizer(folder).ids(text)]
        for part, folder in model.tokenizers.items()
    ]
    return np.concatenate(columns, axis=1)


def teach(tokenizers: Sequence[Tokenizer], model: Model, rows: Mapping[str, np.ndarray]) -> None:
    """Makes the tokenizers of a model's text encoders know words, in the order of their names.

    Raises:
        UserError: a text encoder knows a word already, or has fewer tokens than its tokenizer.
    """
    counts = {word: len(rows[word]) for word in sorted(rows)}
    for (part, folder), tokenizer in zip(model.tokenizers.items(), tokenizers, strict=True):
        size = len(model.parts[part].params[TOKEN_TABLE])
        if tokenizer.vocab_size > size:
            raise UserError(
                f"{folder}: has {tokenizer.vocab_size} tokens, the text encoder knows {size}; "
                "they are of different models"
            )
        tokenizer.add_words(counts, first=size)


def check_said(words: Words, datasets: Sequence[Dataset]) -> None:
    """Raises UserError where no prompt says a word that is trained: nothing would move it."""
    for word, group in words.groups.items():
        if not any(_says(dataset, word) for dataset in datasets):
            raise UserError(
                f"{group.name}: no prompt says {word!r}; put it into captions or into word_names, "
                f"as in `word_names: {{pt1: {word}}}`, for a template with {{pt1}}"
            )


def _says(dataset: Dataset, word: str) -> bool:
    def measure(text: str) -> int:
        return dataset.tokenizers[0].times(word, text)

    # The prompt that says a word most often, of all that can come out.
    return any(
        measure(prompts.longest(record.captions, recipe, measure))
        for record in dataset.records
        for recipe in record.recipe.sides
    )


def line(words: Words, group: Group) -> str:
    """What the plan says of a group's word."""
    (word,) = group.layers
    rows = words.rows[word]
    kind = f"{len(rows)} row{'' if len(rows) == 1 else 's'}"
    return (
        f"{group.name:10}{rows.size:>13,} weights in the word {word!r} ({kind}), "
        f"rate {group.lr:.3g}"
    )
