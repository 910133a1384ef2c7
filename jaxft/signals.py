"""Ctrl-C and SIGTERM as a request to stop at the next step; a second one ends the process."""

import os
import signal
import threading
import time

SAME_REQUEST = 0.25
"""Seconds in which further signals belong to the first: `timeout` and some container runtimes
send one to the process and one to its group."""

_wakeup_in_use = False


class Stop:
    """While entered (main thread only), SIGINT and SIGTERM set `requested` and print one line.

    A second signal exits with 128 + its number at once, also while the main thread compiles or
    waits for a device: a thread reads the signals, which C code cannot hold up. Handlers are
    restored on exit. The exit code of a stop that was asked for (128 + `requested`) is the
    caller's business.
    """

    requested: int | None = None
    """Number of the first signal, or None."""

    def __enter__(self) -> "Stop":
        global _wakeup_in_use
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        self._wakeup = signal.set_wakeup_fd(self._write)
        _wakeup_in_use = True
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, _ignore) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        global _wakeup_in_use
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        _wakeup_in_use = False
        os.close(self._write)  # the watcher reads the end of the pipe
        self._watcher.join()
        os.close(self._read)

    def _watch(self) -> None:
        first = 0.0
        while byte := os.read(self._read, 1):
            number = byte[0]
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            if self.requested is None:
                first = time.monotonic()
                self.requested = number
                name = signal.Signals(number).name
                text = f"\n{name}: stopping after this step and saving; again: exit at once\n"
                os.write(2, text.encode())
            elif time.monotonic() - first > SAME_REQUEST:
                os._exit(128 + number)


def _ignore(number: int, frame: object) -> None:
    """A Python handler must exist for the wakeup descriptor to be written."""


def _leave_to_parent() -> None:
    """A forked child shares the pipe: without this, ending the child would stop its parent."""
    if _wakeup_in_use:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_parent)
