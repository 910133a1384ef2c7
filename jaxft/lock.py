"""One writer per folder: a lock that a crashed holder cannot leave behind."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from jaxft.errors import UserError


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds `folder/.lock` (flock) until the block, or the process in whatever way, ends.

    The file names the holder (host, pid, start) and stays behind, empty: removing it would let
    two later writers lock two different files of that name.

    Raises:
        UserError: another process holds it, or the file system has no locks.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened for locking: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by {_holder(path)}; stop it, or choose another folder"
            ) from error
        except OSError as error:
            raise UserError(
                f"{path}: cannot be locked ({error}); choose a folder on a file system with flock"
            ) from error
        file.truncate(0)
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": started}, file)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} (since {holder['started']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock and writes at this moment
        return "another process"
