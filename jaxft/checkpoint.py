"""Checkpoints of a run: `state/<step>/`, complete only with a manifest of SHA-256.

    state/100/arrays/         Orbax: one flat dict {path of the leaf: array}, no class of ours in it
    state/100/tree.json       {path of the leaf: [shape, dtype]}
    state/100/extra.json      what the caller adds
    state/100/manifest.json   {"step", "files": {name: {"sha256", "size"}}, "sha256" of these two}

A step is written as `100.tmp`, hashed, flushed to disk and then renamed, so that a crash leaves
either a whole step or a `.tmp`, which the next start removes. Orbax commits asynchronously and
promises neither content checksums nor fsync of its metadata; both are done here, after its commit
and before the rename. Whoever makes a `Checkpoints` holds the folder's lock (`jaxft.lock`).
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxft import hosts
from jaxft.errors import UserError

FREE_SPACE = 1.2
"""Free bytes that a save asks for, as a multiple of the size of its arrays."""

_log = logging.getLogger(__name__)


class Checkpoints:
    """The steps saved in one folder, of which the last `keep` are kept."""

    def __init__(self, folder: Path, keep: int):
        """Removes what crashed saves left behind."""
        assert keep >= 1
        self._folder = folder.absolute()
        self._keep = keep
        self._orbax = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(),
            # Orbax' own thread turns a failing mkdir into a timeout of minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self._current: int | None = None  # the step whose state the run last saved or restored
        self._verdicts: dict[int, str | None] = {}  # None: verified; else what is wrong with it
        if hosts.is_first():
            for temp in self._folder.glob("*.tmp"):
                if re.fullmatch(r"[0-9]+\.tmp", temp.name):
                    shutil.rmtree(temp)

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Starts to save a pytree of `jax.Array` and a JSON object; returns when both are copied.

        Waits for the save before it. The state of the step saved or restored last is not saved
        again; anything else that has the step's name is set aside (`100.old-1`), not overwritten.

        Raises:
            UserError: too little free space, or this save or the one before it failed.
        """
        self.wait()
        if step == self._current:
            return
        leaves = _flatten(state)
        tree = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}
        notes = {"tree.json": tree, "extra.json": extra}
        texts = {name: json.dumps(value, indent=1) for name, value in notes.items()}
        self._check_space(step, sum(leaf.nbytes for leaf in leaves.values()))
        temp = self._folder / f"{step}.tmp"
        try:
            if hosts.is_first():
                temp.mkdir(parents=True)
                for name, text in texts.items():
                    (temp / name).write_text(text)
            self._orbax.save(temp / "arrays", args=ocp.args.StandardSave(leaves))
        except OSError as error:
            raise self._failure(step, error) from error
        self._saving = self._thread.submit(self._finish, step, temp)

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            UserError: it failed; names the path, the cause and the free space. Told once.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def latest(self) -> int | None:
        """The newest step that is complete and intact, by number; None if there is none.

        Damaged and incomplete steps and foreign names are passed over, with a warning that names
        them, and left where they are. Of several processes the first looks, for all.
        """
        found = self._latest() if hosts.is_first() else None
        step = hosts.of_first(json.dumps(found))
        return json.loads(step)

    def _latest(self) -> int | None:
        steps, ignored = self._scan()
        for text in ignored:
            _log.warning("ignored: %s", text)
        for step in reversed(steps):
            try:
                self.verify(step)
            except UserError as error:
                _log.warning("checkpoint %d is not used: %s", step, error)
            else:
                return step
        return None

    def verify(self, step: int) -> None:
        """Reads every file of a step against its manifest.

        Raises:
            UserError: names the file that is missing or differs.
        """
        folder = self._folder / str(step)
        try:
            _verify(folder, step)
        except UserError as error:
            self._verdicts[step] = str(error)
            raise
        self._verdicts[step] = None

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """State and extra of a step; the state has the structure and shardings of `abstract`.

        `abstract` is a pytree of `jax.ShapeDtypeStruct`; a leaf without a sharding goes to the
        default device. The devices need not be those of the save.

        Raises:
            UserError: a damaged file; leaves that are missing, unexpected, or of another shape or
                dtype than stored.
        """
        if self._verdicts.get(step, "not verified yet") is not None:
            self.verify(step)
        folder = self._folder / str(step)
        wanted = _flatten(abstract)
        _check_tree(json.loads((folder / "tree.json").read_text()), wanted, folder)
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)
            for name, leaf in wanted.items()
        }
        arrays = self._orbax.restore(folder / "arrays", args=ocp.args.StandardRestore(target))
        state = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])
        self._current = step
        return state, json.loads((folder / "extra.json").read_text())

    def close(self) -> None:
        """Waits like `wait`, then ends the threads; a process that skips this loses its last save.

        Raises:
            UserError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _finish(self, step: int, temp: Path) -> None:
        """In the background: waits for Orbax, hashes, flushes, renames, removes old steps."""
        try:
            self._orbax.wait_until_finished()
            if hosts.is_first():
                self._commit(step, temp)
        except Exception as error:
            raise self._failure(step, error) from error
        self._current = step
        self._verdicts[step] = None
        if hosts.is_first():
            self._prune(step)

    def _commit(self, step: int, temp: Path) -> None:
        files = {
            name: {"sha256": _sha256(path), "size": path.stat().st_size}
            for name, path in _files(temp).items()
        }
        (temp / "manifest.json").write_text(_manifest(step, files))
        for path in [*temp.rglob("*"), temp]:
            _fsync(path)
        final = self._folder / str(step)
        if os.path.lexists(final):
            aside = _unused(final)
            final.rename(aside)
            _log.warning("%s was there already; it is now %s", final, aside.name)
        temp.rename(final)
        _fsync(self._folder)

    def _prune(self, newest: int) -> None:
        """Removes the intact steps before the last `keep`; a failure to do so is no failed save."""
        steps, _ = self._scan()
        good = [step for step in steps if step <= newest and not self._verdicts.get(step)]
        for step in good[: -self._keep]:
            temp = self._folder / f"{step}.tmp"  # half removed, it must not look like a step
            try:
                (self._folder / str(step)).rename(temp)
                shutil.rmtree(temp)
            except OSError as error:
                _log.warning("checkpoint %d was not removed: %s", step, error)

    def _scan(self) -> tuple[list[int], list[str]]:
        """Steps whose folders have a manifest, ascending; what else is there, in words."""
        steps, ignored = [], []
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            if not re.fullmatch(r"0|[1-9][0-9]*", path.name):
                ignored.append(f"{path} is no checkpoint")
            elif not (path / "manifest.json").is_file():
                ignored.append(f"{path / 'manifest.json'} is missing")
            else:
                steps.append(int(path.name))
        return sorted(steps), ignored

    def _check_space(self, step: int, size: int) -> None:
        free = _free(self._folder)
        if free < FREE_SPACE * size:
            raise UserError(
                f"{self._folder}: step {step} needs {FREE_SPACE * size / 2**20:.0f} MiB, only "
                f"{free / 2**20:.0f} MiB are free; make room, then resume"
            )

    def _failure(self, step: int, error: Exception) -> UserError:
        shutil.rmtree(self._folder / f"{step}.tmp", ignore_errors=True)
        return UserError(
            f"{self._folder / str(step)}: step {step} was not saved, with "
            f"{_free(self._folder) / 2**20:.0f} MiB free: {type(error).__name__}: {error}. "
            "Earlier checkpoints are untouched; mend the cause, then resume"
        )


def _flatten(tree: Any) -> dict[str, Any]:
    """{path, as in "opt_state/0/mu/conv_in.weight": leaf}, in the tree's order."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    assert len(leaves) == len(pairs), "two leaves have one path"
    return leaves


def _check_tree(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Orbax casts silently and does not name a misshapen leaf; hence our own look at the tree."""
    problems = [f"{name}: not in the checkpoint" for name in wanted if name not in stored]
    problems += [f"{name}: not in this run" for name in stored if name not in wanted]
    for name, leaf in wanted.items():
        want = [list(leaf.shape), str(leaf.dtype)]
        if name in stored and stored[name] != want:
            problems.append(
                f"{name}: {want[1]}{want[0]} in this run, stored as "
                f"{stored[name][1]}{stored[name][0]}"
            )
    if problems:
        raise UserError(
            f"{folder} is of a run with other parameters, another optimizer or average; resume "
            "with its own configuration:\n  " + "\n  ".join(problems)
        )


def _manifest(step: int, files: Mapping[str, Any]) -> str:
    content = {"step": step, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True)


def _verify(folder: Path, step: int) -> None:
    path = folder / "manifest.json"
    try:
        text = path.read_text()
        manifest = json.loads(text)
        intact = text == _manifest(manifest["step"], manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from error
    if not intact:
        raise UserError(f"{path} is damaged")
    if manifest["step"] != step:
        raise UserError(f"{path} is of step {manifest['step']}")
    present = _files(folder)
    for name, entry in manifest["files"].items():
        if name not in present:
            raise UserError(f"{folder / name} is missing")
        size = present[name].stat().st_size
        if size != entry["size"]:
            raise UserError(f"{present[name]} is damaged: {size} bytes, not {entry['size']}")
    for name, entry in manifest["files"].items():
        if _sha256(present[name]) != entry["sha256"]:
            raise UserError(f"{present[name]} is damaged: its SHA-256 is not the manifest's")


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unused(path: Path) -> Path:
    number = 1
    while os.path.lexists(path.with_name(f"{path.name}.old-{number}")):
        number += 1
    return path.with_name(f"{path.name}.old-{number}")


def _free(folder: Path) -> int:
    """Free bytes where `folder` is or will be."""
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free
