"""Text files in UTF-8 or UTF-16, whole."""

from pathlib import Path

from jaxft.errors import UserError

MAX_BYTES = 2**20
"""Larger files are refused before they are read, unless they may be larger."""


def decode(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """The stripped text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        UserError: names the file and the byte that does not decode.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise UserError(f"{path.name}: more than {max_bytes >> 20} MiB: this is no caption")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.name}: {error.strerror}") from None
    return decoded(data, path.name)


def decoded(data: bytes, name: str) -> str:
    """The text of the bytes of a file."""
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(error.object)  # counted without the mark, or with
        raise UserError(
            f"{name}: byte {offset} (0x{data[offset]:02x}) is not "
            f"{'UTF-16' if utf16 else 'UTF-8'}: save it as UTF-8"
        ) from None
    if fault := fault_of(text):
        raise UserError(f"{name}: holds {fault}: save it as UTF-8 text")
    return text.strip()


def fault_of(text: str) -> str:
    """What keeps a tokenizer from reading the text; '' if nothing does."""
    if "\0" in text:
        return f"a NUL character at {text.index(chr(0))}"
    if text.isascii():  # a million are soon looked at
        return ""
    lone = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    return "" if lone is None else f"half a surrogate pair at {lone}"
