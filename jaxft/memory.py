"""The memory of a device beside what a run needs of it."""

import jax

from jaxft.errors import UserError

REMEDIES = (
    "a smaller batch_size",
    "model.gradient_checkpointing: full",
    "more devices that share the weights (mesh.fsdp)",
    "fewer layers or LoRAs",
    "an optimizer that keeps less",
    "train.offload: [optimizer]",
)


def of_device() -> int | None:
    """Bytes that a program may use on each device; None where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def describe(needed: int, limit: int | None, in_host: int = 0) -> str:
    """Both in words, and what each device has in the host's memory."""
    beside = "" if limit is None else f" of {gib(limit)}"
    more = f", {gib(in_host)} GiB more for each in the host's memory" if in_host else ""
    return f"{gib(needed)}{beside} GiB on each device{more}"


def gib(size: float) -> str:
    """Bytes as a number of GiB."""
    return f"{size / 2**30:.2f}"


def check(needed: int, limit: int | None, what: str) -> None:
    """Compares what a run needs with what there is.

    Raises:
        UserError: it cannot suffice; says by how much, and what takes less.
    """
    if limit is not None and needed > limit:
        raise UserError(
            f"memory: {what} take {describe(needed, limit)}; use {', or '.join(REMEDIES)}"
        )
