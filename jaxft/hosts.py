"""Several processes as one run: how they find each other, agree, and end together.

Every process runs the same program on its own devices; JAX makes one computation of it. In a run
of one process all of this does nothing.
"""

import contextlib
import functools
import json
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jaxft.errors import UserError

COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
"""Variables of launchers: how many processes they have started."""

JOBS = {
    "SLURM_PROCID": ("SLURM_JOB_ID", 1),
    "OMPI_COMM_WORLD_RANK": ("OMPI_MCA_orte_hnp_uri", 2**12),
}
"""Variables of launchers: which process this is -> of what JAX makes the port, and its unit."""

PORT = "JAX_COORDINATOR_PORT"
"""The variable by which JAX is told of another port."""

ON_TPU = "TPU_ML_PLATFORM"
"""A variable that JAX sets on a TPU's host, which may be one of several."""

LAG = 2
"""Steps after which all processes know what one was asked for: none waits for the others' step."""

LOST_AFTER = 60
"""Seconds without a sign of life after which a process counts as lost, where no one waits for what
it computes; its partners then end too, with JAX's message."""

REMEDY = "the processes may be started again with train.resume, the folder of the run"


def is_first() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return jax.process_index() == 0


def progress(*args: Any, **options: Any) -> tqdm:
    """tqdm's bar, shown by the first process."""
    return tqdm(*args, **options, **({} if is_first() else {"disable": True}))


class Mute(contextlib.AbstractContextManager):
    """Stands for what only the first process has: whatever it is asked to do, it does nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: contextlib.nullcontext()

    def __exit__(self, *exception: object) -> None:
        pass


# ------------------------------------------------------------------------------- begin and end


@contextlib.contextmanager
def joined(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """One of several processes while entered, before a device is touched.

    Without arguments Slurm, Open MPI or a TPU's environment says which; else there is one process.
    An error in one process of several ends it at once, and so the others.

    Raises:
        UserError: arguments that do not go together, a port in use, or no answer.
    """
    if not _initialize(coordinator_address, num_processes, process_id):
        yield
        return
    with guarded():
        yield
    jax.distributed.shutdown()


def _initialize(address: str | None, count: int | None, own: int | None) -> bool:
    """Has JAX join the processes; False where this one is alone."""
    given = (address, count, own)
    _check(*given)
    is_given = given != (None, None, None)
    if not is_given and not _launched():
        return False
    if not is_given and (port := _port_of_launcher()) is not None:
        _check_free(port, f"distributed: {PORT} must name another: port {port}")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is `signals`' matter
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=LOST_AFTER)
    except ValueError:
        if is_given:
            raise
        return False  # processors of a batch job, in which this is the only process
    except RuntimeError as error:
        raise UserError(
            f"distributed: the processes did not find each other: {error}\nThe first needs a port "
            f"that is free (coordinator_address; {PORT} where a launcher chooses) and that the "
            "others reach, and all must be started"
        ) from None
    return True


@contextlib.contextmanager
def guarded(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Ends this process, if it is one of several, with a message, when there is an error.

    Others would wait for it for ever, and it for them.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        _leave(error, say)


def _leave(error: Exception, say: Callable[[str], None] | None) -> NoReturn:
    where = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, jax.errors.JaxRuntimeError):
        first = str(error).partition("\n")[0]
        text = f"{where} cannot go on; another may have ended. {first}\n{REMEDY}"
    elif isinstance(error, UserError):
        text = f"{where}: {error}"
    else:
        sys.excepthook(type(error), error, error.__traceback__)
        text = f"{where} ends: {error!r}"
    (say or functools.partial(print, file=sys.stderr))(f"error: {text}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def _launched() -> bool:
    """Whether the environment may be that of one of several processes."""
    several = any(os.environ.get(name, "1") != "1" for name in COUNTS)
    return several or ON_TPU in os.environ


def _check(address: str | None, count: int | None, own: int | None) -> None:
    """Raises UserError for arguments of `joined` that cannot be."""
    given = {"coordinator_address": address, "num_processes": count, "process_id": own}
    lacking = [name for name, value in given.items() if value is None]
    if len(lacking) == len(given):
        return
    if lacking:
        raise UserError(f"distributed: {' and '.join(lacking)} must be given too")
    assert address is not None
    assert count is not None
    assert own is not None
    if not 0 <= own < count:
        raise UserError(f"distributed.process_id: {own} is not below num_processes, {count}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"distributed.coordinator_address: {address!r} is not HOST:PORT")
    if own == 0:
        _check_free(int(port), f"distributed.coordinator_address: choose another: port {port}")


def _port_of_launcher() -> int | None:
    """The port at which the first process of a launcher waits for the others, as JAX chooses it;
    None in the others."""
    for rank, (job, unit) in JOBS.items():
        if os.environ.get(rank) == "0" and job in os.environ:
            number = int(os.environ[job].partition(".")[0]) // unit
            return int(os.environ.get(PORT, number % 2**12 + 2**16 - 2**12))
    return None


def _check_free(port: int, where: str) -> None:
    """Raises UserError for a port that is taken, for which JAX would end without a message."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"{where} cannot be used on this machine ({error.strerror}); all processes must be "
                "told the same"
            ) from None


# -------------------------------------------------------------------------------------- agree


def check_same(what: str, own: Mapping[str, Any]) -> None:
    """Compares a description of the run with the first process'.

    Raises:
        UserError: names the process and the keys that differ, with both values.
    """
    texts = _gather_text(json.dumps(dict(_flat(own))))
    first, *others = map(json.loads, texts)
    problems = [
        f"  process {number}: {key} is {other.get(key, 'missing')}, in process 0 "
        f"{first.get(key, 'missing')}"
        for number, other in enumerate(others, 1)
        for key in sorted(first.keys() | other.keys())
        if first.get(key) != other.get(key)
    ]
    if problems:
        raise UserError("\n".join([f"the processes do not have the same {what}:", *problems]))


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of all leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", repr(value)


def of_first(text: str) -> str:
    """The first process' text."""
    return _gather_text(text)[0]


def largest(number: int) -> int:
    """The largest of all processes' numbers; waits for them."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


class Largest:
    """The largest of all processes' numbers, told `LAG` calls later, so that none waits."""

    def __init__(self, mesh: Mesh):
        self._mesh, self._where = mesh, NamedSharding(mesh, P(mesh.axis_names))
        self._compute = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._pending: deque[jax.Array] = deque()

    def __call__(self, number: int) -> int:
        """The largest of the numbers of the call `LAG` calls ago; 0 before there is one."""
        if jax.process_count() == 1:
            return number
        own = np.full(len(self._mesh.local_devices), number, np.int32)
        numbers = jax.make_array_from_process_local_data(self._where, own, (self._mesh.size,))
        self._pending.append(self._compute(numbers))
        return int(self._pending.popleft()) if len(self._pending) > LAG else 0


def shares(wanted: Sequence[Any], kept_in_common: bool) -> Iterator[Sequence[Any]]:
    """What to make, in turn: this process' share; when all have made theirs, everything, of which
    nothing is left where what is made is kept for all. For one process, only everything."""
    if kept_in_common and jax.process_count() > 1:
        yield wanted[jax.process_index() :: jax.process_count()]
        largest(0)
    yield wanted


def _gather_text(text: str) -> list[str]:
    """Every process' text."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    padded = np.zeros(largest(len(data)) + 1, np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded).reshape(jax.process_count(), -1)
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]
