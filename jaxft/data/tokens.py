"""Prompts to token ids: CLIP's tokenizer, in rows of 77."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not installed
from transformers import CLIPTokenizer

from jaxft.errors import UserError

ROW = 77
"""Positions of CLIP's text encoder: a start, 75 tokens of text, an end."""


class Tokenizer:
    """The tokenizer of a model folder; any number of threads may encode at once."""

    def __init__(self, folder: Path):
        """Reads `tokenizer.json`, or `vocab.json` and `merges.txt`, of the folder; no network.

        Raises:
            UserError: a file is missing or does not make a tokenizer.
        """
        # transformers makes a tokenizer of three tokens where the vocabulary is missing.
        missing = [n for n in ("vocab.json", "merges.txt") if not (folder / n).is_file()]
        if missing and not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder} is no tokenizer folder: it lacks {' and '.join(missing)}")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{folder}: not a CLIP tokenizer: {error}") from None
        self._backend = tokenizer.backend_tokenizer
        # Padding here, not there: the library's own is a setting that threads would fight over.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._start, self._end = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self._pad = int(tokenizer.pad_token_id)
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        """One more than the largest id; the text encoder must have as many embeddings."""
        self._rows: dict[int, range] = {}
        """The tokenizer's own id of an added word -> the ids that it stands for."""

    def add_words(self, words: Mapping[str, int], first: int) -> None:
        """Makes each word stand for a number of ids of its own, counted up from `first`.

        As in diffusers and HCP-Diffusion a word is found anywhere in a text, in upper case too, and
        of two words that begin alike the longer one.

        Raises:
            UserError: the text encoder knows a word already, or two words are one to the tokenizer.
        """
        spellings: dict[str, str] = {}
        for word in words:
            if len(self.ids(word)) < 2:
                raise UserError(
                    f"the word {word!r} is in the model's vocabulary already; give it (its file) "
                    "another name, such as one with a number"
                )
            spelling = self._backend.normalizer.normalize_str(word)
            if other := spellings.get(spelling):
                raise UserError(f"the words {other!r} and {word!r} are one to the tokenizer")
            spellings[spelling] = word
        for word, count in words.items():
            self._backend.add_tokens([word])
            self._rows[self._backend.token_to_id(word)] = range(first, first + count)
            first += count

    @property
    def with_words(self) -> bool:
        """Whether some words stand for several tokens."""
        return any(len(rows) > 1 for rows in self._rows.values())

    def ids(self, text: str) -> list[int]:
        """The ids of a text's tokens, without start and end."""
        return [token for token, _ in self._tokens(text)]

    def _tokens(self, text: str) -> list[tuple[int, int]]:
        """Each token's id and the place of its first character."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return [
            (row, start)
            for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
            for row in self._rows.get(token, (token,))
        ]

    def times(self, word: str, text: str) -> int:
        """How often a text says an added word."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids.count(self._backend.token_to_id(word))

    def length(self, text: str) -> int:
        """Tokens of the text, without start and end."""
        return len(self.ids(text))

    def fits(self, text: str, repeats: int = 1) -> bool:
        """Whether `encode` keeps all of the text."""
        return self.length(text) <= (ROW - 2) * repeats

    def encode(self, text: str, repeats: int = 1) -> Int[np.ndarray, "repeats 77"]:
        """The first 75·repeats tokens in rows of start, up to 75 tokens, end, padding.

        One row is what CLIPTokenizer and diffusers' pipelines give. Several rows are
        HCP-Diffusion's layout (`tokenizer_repeats`) where padding is the end token, as in SD 1.x.
        """
        content, width = self.ids(text), ROW - 2
        ids = np.full((repeats, ROW), self._pad, np.int32)
        ids[:, 0] = self._start
        for row in range(repeats):
            part = content[row * width : (row + 1) * width]
            ids[row, 1 : 1 + len(part)] = part
            ids[row, 1 + len(part)] = self._end
        return ids
