"""Arrays on disk: what was added is found by all, nothing damaged or half is used."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxft import tensor_file
from jaxft.data.disk import Disk
from jaxft.data.places import NAME, Place, Places
from jaxft.errors import UserError

KEYS = [(number, "a", (1, 2)) for number in range(40)]


def array(key) -> np.ndarray:
    return np.random.default_rng(key[0]).standard_normal((3, 4, 8)).astype(np.float32)


def lacking(store: Disk, keys=KEYS) -> list:
    """Those of the keys that are missing."""
    return [keys[place] for place in store.missing(keys)]


def fill(store: Disk, keys=KEYS) -> Disk:
    with store:
        for key in lacking(store, keys):
            store[key] = array(key)
    return store


def test_what_was_added_is_read_by_any_later_store(tmp_path):
    folder = tmp_path / "deep" / "latents"
    stored = fill(Disk(folder, {"vae": "x"}))
    told = []
    later = Disk(folder, {"vae": "x"}, say=told.append)
    before = sorted(folder.iterdir())
    assert later.missing([*KEYS, *KEYS[:3], ("new",), ("new",)]) == [len(KEYS) + 3]
    assert told == [f"cache     40 of 41 latents found in {folder.parent}"]
    assert fill(later).missing(KEYS) == []
    assert sorted(folder.iterdir()) == before
    for key in KEYS:
        for store in (stored, later):
            assert store[key].dtype == np.float32
            np.testing.assert_array_equal(store[key], array(key))


def test_another_model_and_another_key_find_nothing(tmp_path):
    fill(Disk(tmp_path, {"vae": "x"}), KEYS[:3])
    assert lacking(Disk(tmp_path, {"vae": "y"}), KEYS[:3]) == KEYS[:3]
    other = [(*key[:2], (2, 1)) for key in KEYS[:3]]
    assert lacking(Disk(tmp_path, {"vae": "x"}), other) == other


def test_dtypes_come_back(tmp_path):
    half = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3)
    with Disk(tmp_path, {}) as store:
        store["half"] = half
        store["number"] = np.float32(3).reshape(())
    later = Disk(tmp_path, {})
    assert later.missing(["half", "number"]) == []
    assert later["half"].dtype == half.dtype
    np.testing.assert_array_equal(later["half"].view(np.uint16), half.view(np.uint16))
    assert later["number"] == 3


def test_no_change_of_a_shard_goes_unseen(tmp_path):
    """Bits are flipped, the end is cut off: what is found is what was written."""
    fill(Disk(tmp_path / "good", {}))
    (shard,) = (tmp_path / "good").iterdir()
    content, draw = shard.read_bytes(), random.Random(0)
    flips = [(draw.randrange(len(content)), 1 << draw.randrange(8)) for _ in range(120)]
    flips += [(place, 1) for place in range(40)]
    changed = [content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :] for at, bit in flips]
    changed += [content[: draw.randrange(len(content))] for _ in range(20)]
    seen = 0
    for number, bad in enumerate(changed):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / shard.name).write_bytes(bad)
        store = Disk(folder, {})
        without = lacking(store)
        for key in KEYS:
            if key not in without:
                np.testing.assert_array_equal(store[key], array(key))
        seen += bool(without)
    assert seen > 0.95 * len(changed)  # the rest are spaces and texts that say nothing


def test_a_damaged_shard_is_put_aside_and_told(tmp_path, caplog):
    fill(Disk(tmp_path, {}))
    (shard,) = tmp_path.iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    reader = Disk(tmp_path, {})  # of another run, which checked the shard when it was good
    fill(Disk(tmp_path, {}))
    assert f"{shard} is damaged" in caplog.text
    assert shard.with_suffix(".damaged").read_bytes() == content
    assert fill(Disk(tmp_path, {})).missing(KEYS) == []
    name = next(key for key in KEYS if (reader[key] == array(key)).all())
    np.testing.assert_array_equal(reader[name], array(name))
    shard.with_suffix(".damaged").unlink()
    with pytest.raises(UserError, match=shard.name):
        reader[name]


def test_the_first_of_two_copies_counts_for_ever(tmp_path):
    with Disk(tmp_path, {}) as first, Disk(tmp_path, {}) as second:
        first["k"] = np.zeros(1)
        first.__exit__(None, None, None)
        first.__enter__()
        time.sleep(0.02)
        second["k"] = np.ones(1)
    assert len(list(tmp_path.iterdir())) == 2
    assert Disk(tmp_path, {})["k"] == 0


def test_of_many_shards_each_array_is_found_and_those_of_one_can_go(tmp_path):
    """As a dict finds them, whatever zeros their names and digests end in."""
    draw, places, expected = np.random.default_rng(0), Places(), {}
    kinds = [(np.dtype(np.float32), (2, 3)), (np.dtype(np.float16), (3,)), (np.dtype("i4"), ())]
    for number in range(9):
        names = [draw.bytes(31 - n % 3) + b"\0" * (1 + n % 3) for n in range(40)]
        entries, texts = {}, {}
        for at, name in enumerate([*names, *list(expected)[:5]]):
            digest, (dtype, shape) = draw.bytes(30) + b"\0\0", kinds[(at + number) % 3]
            entries[name.hex()] = tensor_file.Entry(dtype, shape, 8 * at, 8 * at + 8)
            texts[name.hex()] = digest.hex()
            place = Place(tmp_path / str(number), dtype, shape, 100 + 8 * at, digest)
            expected.setdefault(name, place)
        places.add(tmp_path / str(number), tensor_file.Header(entries, texts, 100))
        assert {name: places[name] for name in expected} == expected
    wanted = np.frombuffer(b"".join([*expected, b"x" * 32]), NAME)
    assert places.holds(wanted).tolist() == [True] * len(expected) + [False]
    for shard, own in places.by_shard(wanted):
        theirs = [place for place in expected.values() if place.shard == shard]
        assert list(own) == sorted(theirs, key=lambda place: place.start)
    places.remove(tmp_path / "4")
    kept = [place.shard != tmp_path / "4" for place in expected.values()]
    assert places.holds(wanted).tolist() == [*kept, False]
    with pytest.raises(KeyError):
        places[b"x" * 32]


def test_folders_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir: .*file"):
        fill(Disk(tmp_path / "file" / "latents", {}))
    (tmp_path / "latents").write_text("")
    with pytest.raises(UserError, match=r"cache_dir: .*latents"):
        Disk(tmp_path / "latents", {})


def test_foreign_files_are_left_alone_and_old_leftovers_removed(tmp_path):
    tensor_file.write(tmp_path / "theirs.safetensors", {"x": np.zeros(2)})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".a.safetensors.1.tmp").write_text("of a builder that runs now")
    old = tmp_path / ".b.safetensors.2.tmp"
    old.write_text("of one that was killed")
    os.utime(old, (0, 0))
    fill(Disk(tmp_path, {}))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"theirs.safetensors", "notes.txt", ".a.safetensors.1.tmp"} < names
    assert old.name not in names


# ------------------------------------------------------------------------------ several processes

BUILDER = """
import sys
from pathlib import Path
import numpy as np
from jaxft.data import disk
disk.SHARD_ARRAYS = 3
with disk.Disk(Path(sys.argv[1]), {}) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    keys = [(number, "a", (1, 2)) for number in range(int(sys.argv[2]))]
    for number in store.missing(keys):
        rng = np.random.default_rng(number)
        store[keys[number]] = rng.standard_normal((3, 4, 8)).astype(np.float32)
"""


def builder(folder: Path, count: int) -> subprocess.Popen:
    """A process that is about to fill a cache."""
    command = [sys.executable, "-c", BUILDER, str(folder), str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def go(process: subprocess.Popen) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def test_two_builders_at_once_leave_one_whole_cache(tmp_path):
    processes = [builder(tmp_path, len(KEYS)) for _ in range(2)]
    for process in processes:
        go(process)
    assert [process.wait(120) for process in processes] == [0, 0]
    store = Disk(tmp_path, {})
    assert store.missing(KEYS) == []
    for key in KEYS:
        np.testing.assert_array_equal(store[key], array(key))
    assert not list(tmp_path.glob("*.damaged"))


def test_a_killed_builder_leaves_nothing_half_and_the_next_goes_on(tmp_path):
    many = [(number, "a", (1, 2)) for number in range(100_000)]
    process = builder(tmp_path, len(many))
    go(process)
    while len(list(tmp_path.glob("*.safetensors"))) < 4:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = Disk(tmp_path, {})
    found = len(many) - len(store.missing(many))
    assert 12 <= found < len(many)
    for key in many[:12]:
        np.testing.assert_array_equal(store[key], array(key))
    assert not list(tmp_path.glob("*.damaged"))
    assert fill(Disk(tmp_path, {}), many[: found + 9]).missing(many[:20]) == []
