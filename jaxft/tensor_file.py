"""safetensors files: checked before they are trusted, mapped when read, streamed when written.

The format: https://github.com/huggingface/safetensors. A file is read without being copied: its
arrays are views of the file, whose pages the system loads when they are looked at. It is written
tensor by tensor under another name, read back, and only then given its own.
"""

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxft.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER, MAX_TENSORS, MAX_NAME = 16 * 2**20, 50_000, 512
"""Bytes, tensors, characters; the largest model of today has a header of under 1 MiB."""

METADATA = "__metadata__"
START = struct.Struct("<Q")
"""The length of the header, before it."""

PICKLES = {b"PK\x03\x04": "a .ckpt or .pt file of PyTorch", b"\x80\x02": "a pickle of Python"}
"""What a renamed file of another kind begins with."""

HASHES = {"modelspec.hash_sha256": "0x", "sshs_model_hash": ""}
"""Metadata keys under which the writer puts the SHA-256 of the tensors' bytes -> what it begins
with: ModelSpec's, and kohya's, by which webuis find a LoRA again."""

LEGACY_HASH, LEGACY_START, LEGACY_SIZE = "sshs_legacy_hash", 2**20, 2**16
"""Metadata key of kohya's older hash: the first 8 digits of the SHA-256 of these bytes, in a file
with no metadata but `ss_…`."""


class Entry(NamedTuple):
    """A tensor in the header; `start` and `end` in bytes from the end of the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """What a file says of itself."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    size: int
    """Bytes before the tensors."""


class _InvalidError(Exception):
    """What is wrong with a header."""


def read_header(path: Path) -> Header:
    """The header of a file, after all of it has been checked.

    Raises:
        UserError: there is no such file, or it is damaged, or something else than it is called.
    """
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            start = file.read(START.size + 1)
            for magic, kind in PICKLES.items():
                # A header of the right length begins alike; it goes on with a brace.
                if start.startswith(magic) and start[START.size :] != b"{":
                    raise UserError(
                        f"{path}: this is {kind}, not safetensors; it may run code when it is "
                        "opened, so jaxft does not"
                    )
            file.seek(START.size)
            start = start[: START.size]
            if len(start) < START.size:
                raise _InvalidError(f"it has {length} bytes")
            (size,) = START.unpack(start)
            if size > MAX_HEADER or START.size + size > length:
                raise _InvalidError(f"its header would have {size} bytes")
            header = _parse(file.read(size))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except _InvalidError as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); get the file again"
        ) from None
    needed = START.size + size + max((entry.end for entry in header[0].values()), default=0)
    if needed != length:
        what = "is cut off" if needed > length else "has something behind its end"
        raise UserError(
            f"{path}: not a readable safetensors file (it {what}: {length} bytes, not {needed}); "
            "get the file again"
        )
    return Header(*header, START.size + size)


def _parse(text: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _InvalidError(f"its header is no JSON: {error}") from None
    if not isinstance(content, dict) or text[:1] != b"{":
        raise _InvalidError("its header is no JSON object")
    metadata = content.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _InvalidError("its metadata are not texts")
    if len(content) > MAX_TENSORS:
        raise _InvalidError(f"it would hold {len(content)} tensors")
    tensors = {name: _entry(name, fields) for name, fields in content.items()}
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise _InvalidError(f"{name!r} does not begin where the tensor before it ends")
        end = entry.end
    return tensors, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise _InvalidError("a name is in its header twice")
    return content


def _entry(name: str, fields: Any) -> Entry:
    if len(name) > MAX_NAME or not name.isprintable():
        raise _InvalidError(f"{name[:40]!r} is no name of a tensor")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _InvalidError(f"the entry of {name!r} is not one of dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if dtype not in DTYPES:
        raise _InvalidError(f"{name!r} is of the dtype {dtype!r}")
    for numbers in (shape, offsets):
        whole = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not whole or len(numbers) > 32:
            raise _InvalidError(f"{name!r} has shape {shape} and offsets {offsets}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _InvalidError(f"{name!r} has shape {shape} and offsets {offsets}, which do not fit")
    return Entry(DTYPES[dtype], tuple(shape), *offsets)


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, as views of it that cannot be written to.

    Raises:
        UserError: as `read_header`.
    """
    header = read_header(path)
    if not any(entry.end for entry in header.tensors.values()):
        return {name: np.zeros(entry.shape, entry.dtype) for name, entry in header.tensors.items()}
    data = np.memmap(path, np.uint8, "r", header.size)
    _mapping(data).madvise(mmap.MADV_WILLNEED)  # the disk is read while others look at the shapes
    return {
        name: np.asarray(data[entry.start : entry.end]).view(entry.dtype).reshape(entry.shape)
        for name, entry in header.tensors.items()
    }


def write(
    path: Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    dtype: Any = None,
) -> None:
    """Writes a file: all of it or nothing, under its final name.

    Args:
        path: where to; its folder is made.
        tensors: name -> array, or what has a shape, a dtype and `__array__`: each is made into an
            array when its turn comes, so that no two need be in memory.
        metadata: texts for the header; those of `HASHES` get the SHA-256 of the tensors' bytes,
            `LEGACY_HASH` kohya's older hash.
        dtype: of floating tensors in the file; None: as they are. Each is cast alone.

    Raises:
        UserError: the file that was written does not hold what it should.
    """
    kinds = {name: _stored(np.dtype(value.dtype), dtype) for name, value in tensors.items()}
    # As the library has it: the widest first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))
    entries, end = {}, 0
    for name in order:
        start, end = end, end + math.prod(tensors[name].shape) * kinds[name].itemsize
        entries[name] = {
            "dtype": NAMES[kinds[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    texts = {"format": "pt"} | dict(metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            file.write(_header(_hashed(texts, "0" * 64, "0" * 8), entries))
            start = file.tell()
            sha256 = hashlib.sha256()
            for name in order:
                array = np.ascontiguousarray(tensors[name], kinds[name])
                data: Any = array.reshape(-1).view(np.uint8)
                sha256.update(data)
                file.write(data)
                _release(tensors[name])
            hashed = _hashed(texts, sha256.hexdigest(), _legacy_hash(file, start, texts, entries))
            file.seek(0)
            file.write(_header(hashed, entries))
            file.flush()
            os.fsync(file.fileno())
        if digest(temporary, start) != sha256.hexdigest():
            raise UserError(f"{path}: the disk does not give back what was written to it")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _release(value: Any) -> None:
    """Gives back the memory that a mapped file takes; what is looked at again is loaded again.

    Without it, converting a model would keep all of it in memory.
    """
    mapping = _mapping(value)
    if isinstance(mapping, mmap.mmap):
        mapping.madvise(mmap.MADV_DONTNEED)


def _mapping(value: Any) -> Any:
    """What an array is a view of, in the end: of a file's tensors the mapped file."""
    while isinstance(value, np.ndarray):
        value = value.base
    return value


def _stored(own: np.dtype, wanted: Any) -> np.dtype:
    """The dtype in the file: floating tensors have the one that is wanted."""
    is_float = NAMES[own].startswith(("F", "BF"))
    return np.dtype(wanted) if is_float and wanted is not None else own


def _header(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    """Length and header, as the library writes them."""
    content = {METADATA: metadata} | dict(entries)
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return START.pack(len(text)) + text


def _hashed(metadata: Mapping[str, str], digest: str, legacy: str) -> dict[str, str]:
    """The metadata with their hashes filled in; as long for any."""
    hashes = {key: start + digest for key, start in HASHES.items()} | {LEGACY_HASH: legacy}
    return {key: hashes.get(key, text) for key, text in metadata.items()}


def _legacy_hash(
    file: BinaryIO, start: int, metadata: Mapping[str, str], entries: Mapping[str, Any]
) -> str:
    """kohya's older hash of a file whose tensors begin at `start`."""
    kohyas = {key: text for key, text in metadata.items() if key.startswith("ss_")}
    file.seek(start + LEGACY_START - len(_header(kohyas, entries)))
    return hashlib.sha256(file.read(LEGACY_SIZE)).hexdigest()[:8]


def digest(path: Path, start: int) -> str:
    """SHA-256 of what a file holds from a byte on."""
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()
