"""safetensors files: the library reads what we write, and the other way; damage is refused."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from jaxft import tensor_file
from jaxft.errors import UserError
from tests.test_formats import same_bits


@pytest.fixture
def tensors(rng):
    return {
        "a.weight": rng.standard_normal((3, 2), np.float32),
        "half": rng.standard_normal(5).astype(np.float16),
        "b": rng.standard_normal((2, 0)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(4),
        "flag": np.array([True, False, True]),
        "scale": np.float32(2.5).reshape(()),
        "c": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    }


def test_the_library_reads_what_is_written(tensors, tmp_path):
    tensor_file.write(tmp_path / "x.safetensors", tensors, {"title": "x"})
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt", "title": "x"}
    assert same_bits(theirs, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_the_library_writes_is_read(tensors, tmp_path):
    own = {
        name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()
    }
    save_file(own, tmp_path / "x.safetensors", {"title": "x"})
    assert same_bits(tensor_file.read(tmp_path / "x.safetensors"), tensors)
    header = tensor_file.read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"title": "x"}
    assert {name: entry.shape for name, entry in header.tensors.items()} == {
        name: array.shape for name, array in tensors.items()
    }


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_are_cast_and_nothing_else(tensors, tmp_path, kind):
    tensor_file.write(tmp_path / "x.safetensors", tensors, dtype=kind)
    wanted = {
        name: array if array.dtype in (np.int64, np.bool_) else array.astype(kind)
        for name, array in tensors.items()
    }
    assert same_bits(tensor_file.read(tmp_path / "x.safetensors"), wanted)


def test_the_hash_is_that_of_the_tensors_bytes(tensors, tmp_path):
    import hashlib

    file = tmp_path / "x.safetensors"
    tensor_file.write(file, tensors, {"modelspec.hash_sha256": ""})
    header = tensor_file.read_header(file)
    data = file.read_bytes()[header.size :]
    assert header.metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"


def test_kohyas_hashes_are_those_of_its_trainer(tmp_path, rng):
    """As kohya-ss/sd-scripts computes them: of the library's file with its own metadata alone."""
    import hashlib

    stored = {
        f"lora_unet_{i}.lora_up.weight": rng.standard_normal((320, 512), np.float32)
        for i in range(3)
    } | {"lora_unet_0.alpha": np.ones((), np.float32)}
    texts = {"ss_tag_frequency": '{"train": {"夏目": 3, "quote"": 1}}', "ss_network_dim": "8"}
    hashes = {"sshs_model_hash": "", "sshs_legacy_hash": "", "modelspec.title": "a LoRA"}
    tensor_file.write(tmp_path / "x.safetensors", stored, texts | hashes)
    metadata = tensor_file.read_header(tmp_path / "x.safetensors").metadata
    kohyas = save(stored, texts)
    (size,) = tensor_file.START.unpack(kohyas[:8])
    assert metadata["sshs_model_hash"] == hashlib.sha256(kohyas[8 + size :]).hexdigest()
    old = hashlib.sha256(kohyas[0x100000:0x110000]).hexdigest()[:8]
    assert metadata["sshs_legacy_hash"] == old
    assert metadata.items() > texts.items()


def resident() -> int:
    """Bytes of mapped files that this process holds in memory."""
    (line,) = (t for t in Path("/proc/self/status").read_text().splitlines() if "RssFile" in t)
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells")
def test_a_file_that_was_written_from_another_leaves_nothing_in_memory(tmp_path):
    tensors = {str(i): np.full(2**18, i, np.float32) for i in range(32)}
    tensor_file.write(tmp_path / "a.safetensors", tensors)
    mapped = tensor_file.read(tmp_path / "a.safetensors")
    before = resident()
    tensor_file.write(tmp_path / "b.safetensors", mapped)
    assert resident() - before < 4 * 2**20  # of 32 MiB
    assert same_bits(mapped, tensors)


def test_what_was_there_stays_when_writing_fails(tensors, tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    tensor_file.write(file, tensors)
    before = file.read_bytes()
    monkeypatch.setattr(tensor_file, "digest", lambda path, start: "something else")
    with pytest.raises(UserError, match="does not give back"):
        tensor_file.write(file, {"a": np.zeros(3, np.float32)})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
GOOD = json.dumps({"a": ENTRY}).encode()
BAD = {
    "empty": (b"", "0 bytes"),
    "cut off in the length": (b"abc", "3 bytes"),
    "header longer than the file": (struct.pack("<Q", 99) + b"{}", "99 bytes"),
    "huge header": (struct.pack("<Q", 2**60) + b"{}", "bytes"),
    "no JSON": (raw(b"{nonsense"), "no JSON"),
    "deep JSON": (raw(b'{"a":' + b"[" * 100_000), "no JSON"),
    "a list": (raw(b"[]"), "no JSON object"),
    "duplicate": (raw(GOOD[:-1] + b", " + GOOD[1:], bytes(4)), "twice"),
    "metadata": (raw(b'{"__metadata__": {"a": 1}}'), "metadata"),
    "name": (raw(json.dumps({"a\n": ENTRY}).encode(), bytes(4)), "no name"),
    "dtype": (raw(json.dumps({"a": ENTRY | {"dtype": "F31"}}).encode(), bytes(4)), "F31"),
    "shape": (raw(json.dumps({"a": ENTRY | {"shape": [-1]}}).encode(), bytes(4)), "shape"),
    "shape that does not fit": (
        raw(json.dumps({"a": ENTRY | {"shape": [2]}}).encode(), bytes(4)),
        "do not fit",
    ),
    "offsets": (
        raw(json.dumps({"a": ENTRY | {"data_offsets": [4, 8]}}).encode(), bytes(8)),
        "begin",
    ),
    "overlap": (raw(json.dumps({"a": ENTRY, "b": ENTRY}).encode(), bytes(4)), "begin"),
    "a field too many": (raw(json.dumps({"a": ENTRY | {"x": 1}}).encode(), bytes(4)), "entry"),
    "truncated": (raw(GOOD, bytes(3)), "cut off"),
    "padded": (raw(GOOD, bytes(5)), "behind its end"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
    "zip": (b"PK\x03\x04" + bytes(30), "PyTorch"),
}


@pytest.mark.parametrize("what", BAD)
def test_damaged_files_are_refused_by_name(tmp_path, what):
    content, message = BAD[what]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.safetensors") as error:
        tensor_file.read(file)
    assert message in str(error.value)


def test_a_header_as_long_as_a_pickles_first_bytes_is_read(tmp_path):
    header = GOOD + b" " * (0x280 - len(GOOD))
    content = raw(header, bytes(4))
    assert content.startswith(b"\x80\x02")
    (tmp_path / "x.safetensors").write_bytes(content)
    assert tensor_file.read(tmp_path / "x.safetensors")["a"].tolist() == [0.0]


def test_a_good_file_is_not_refused(tmp_path):
    (tmp_path / "good.safetensors").write_bytes(raw(GOOD, bytes(4)))
    assert tensor_file.read(tmp_path / "good.safetensors")["a"].tolist() == [0.0]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=6), st.integers(0, 90), st.integers(0, 6), st.binary(max_size=5))
def test_what_we_accept_the_library_accepts(tmp_path_factory, inserted, at, removed, behind):
    """A valid file with some bytes replaced: read alike, or refused by us."""
    content = raw(GOOD, struct.pack("<f", 1.5))
    content = content[:at] + inserted + content[at + removed :] + behind
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    file.write_bytes(content)
    try:
        ours = tensor_file.read(file)
    except UserError:
        return
    try:
        with safe_open(file, framework="np") as opened:
            theirs = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AssertionError(f"the library refuses {content!r}: {error}") from None
    assert same_bits(ours, theirs)
