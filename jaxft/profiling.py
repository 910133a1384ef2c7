"""`train.profile` -> a trace of some updates, which TensorBoard and Perfetto open."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxft import hosts
from jaxft.errors import UserError

FOLDER = "profile"
"""In that of the run."""


def check(updates: Sequence[int] | None, total_steps: int) -> None:
    """Raises UserError for updates that a run of so many does not have."""
    if updates is None:
        return
    if len(updates) != 2 or not 1 <= updates[0] <= updates[1] <= total_steps:
        raise UserError(
            f"train.profile: {list(updates)} is not the first and the last of some updates of the "
            f"run, which has {total_steps}, such as [10, 12]"
        )


def told(updates: Sequence[int] | None) -> list[str]:
    """The trace as a line of the plan."""
    return [f"updates {updates[0]} to {updates[1]}, into {FOLDER}/"] if updates else []


class Trace:
    """Traces the first process and its devices from the first of the updates to the last.

    Args:
        updates: both of them; None: nothing is traced.
        folder: of the run.
        say: is told where the trace is.
    """

    def __init__(self, updates: Sequence[int] | None, folder: Path, say: Callable[[str], None]):
        own = updates if updates and hosts.is_first() else None
        self._first, self._end = (own[0], own[1] + 1) if own else (None, None)
        self._folder, self._say = folder / FOLDER, say
        self._is_running = False

    def before(self, step: int, state: Any) -> None:
        """Begins or ends before an update, when `state`, all arrays of the last, is there."""
        if step in (self._first, self._end):
            jax.block_until_ready(state)
            self.close()
            if step == self._first:
                jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
                self._is_running = True

    def close(self) -> None:
        """Ends, where it has begun."""
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False
            self._say(f"profile   {self._folder}")
