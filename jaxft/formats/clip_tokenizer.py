"""CLIP's tokenizer for models in one file, which have weights and nothing else.

The byte pairs that it merges come with jaxft (`builtin/clip_tokenizer`); all else follows from
them, as in `simple_tokenizer.py` of OpenAI's CLIP.
"""

import functools
import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxft import builtin

MERGES = Path(builtin.__file__).parent / "clip_tokenizer" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
SIZE = 49_408
"""Tokens that it knows: 256 bytes, within a word and at its end, 48,894 merges, start and end."""


@functools.cache
def folder(pad: str = END) -> Path:
    """A folder of the tokenizer, there until the program ends.

    Args:
        pad: the token behind a prompt: `END` for OpenAI's models, `!` (the id 0) for OpenCLIP's.
    """
    made = Path(_directory().name) / pad.strip("<|>")
    write(made, gzip.decompress(MERGES.read_bytes()).decode().splitlines(), pad)
    return made


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="jaxft-tokenizer-")


def write(folder: Path, merges: Sequence[str], pad: str = END) -> int:
    """Writes a CLIPTokenizer with these merges; returns how many tokens it knows."""
    symbols = byte_symbols()
    words = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, START, END])}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
        "do_lower_case": True,
        "model_max_length": 77,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return len(vocabulary)


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [symbols[byte] for byte in (*printable, *rest)]
