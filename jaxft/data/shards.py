"""Tars in WebDataset's form: members that share a name up to its first dot are one sample.

An image is a member `KEY.jpg` (or another suffix of images); its caption `KEY.txt`, `KEY.caption`
or `KEY.json`. Other members, such as `KEY.mask.png`, are left alone. Nothing is ever unpacked: the
members' places are found once, and read where they lie.
"""

import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jaxft.data import images
from jaxft.errors import UserError

RECIPE = 1
"""To be raised when something else is found in a tar: what was found before is kept."""

LEAST = 8
"""Tars from which on what they hold is kept."""

SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""How tars are called; those that are compressed are refused."""

CAPTIONS = (".txt", ".caption", ".json")
"""Suffixes of members that hold a caption; the first of them counts."""

_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}
"""How compressed files begin, and what unpacks them."""


class Member(NamedTuple):
    """A member that is an image or a caption."""

    name: str
    start: int
    """Of its content, in bytes."""
    size: int


class Contents(NamedTuple):
    """What a tar holds."""

    members: list[Member]
    problems: list[str]
    """What must be mended, each about one member."""
    others: dict[str, int]
    """Suffix -> number of members that are left alone."""


def contents(path: Path) -> Contents:
    """The images and captions of a tar, in its order.

    Raises:
        UserError: it is none, is compressed or is cut off.
    """
    try:
        with path.open("rb") as file:
            head = file.read(6)
            for magic, program in _PACKED.items():
                if head.startswith(magic):
                    raise UserError(f"is compressed; unpack it with {program}: images are already")
            length = file.seek(0, 2)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                found = _sorted_out(tar, length)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                # The library takes a damaged header for the end.
                raise UserError(f"is damaged or cut off at byte {tar.offset}: make it anew")
            return found
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"is no tar, or cut off ({error})") from None
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None


def _sorted_out(tar: Iterable[tarfile.TarInfo], length: int) -> Contents:
    members, problems, others = [], [], Counter()
    seen: set[str] = set()
    for info in tar:
        name = info.name
        suffix = f".{_field(name)}"
        if info.isdir() or PurePosixPath(name).name.startswith("."):
            continue
        if info.offset_data + info.size > length:
            raise UserError(f"is cut off within {name!r}: make it anew")
        if suffix not in images.SUFFIXES and suffix not in CAPTIONS:
            others[PurePosixPath(name).suffix.casefold() or "without suffix"] += 1
        elif not info.isreg() or info.issparse():
            problems.append(f"{name!r} is a link or no plain file: pack files")
        elif name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name:
            problems.append(f"{name!r} leads out of the tar")
        elif name in seen:
            problems.append(f"{name!r} is there twice")
        else:
            seen.add(name)
            members.append(Member(name, info.offset_data, info.size))
    samples = Counter(key(member.name) for member in members if is_image(member.name))
    problems += [f"{name!r} has several images" for name, n in samples.items() if n > 1]
    return Contents(members, problems, dict(others))


def key(name: str) -> str:
    """A member's name up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _field(name: str) -> str:
    """What follows the first dot, casefolded."""
    return name.rpartition("/")[2].partition(".")[2].casefold()


def is_image(name: str) -> bool:
    """Whether a member of `contents` is one."""
    return f".{_field(name)}" in images.SUFFIXES
