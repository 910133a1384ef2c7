"""Pickled checkpoints (.ckpt, .pt, .bin) to safetensors, in a process of their own.

A pickle is a program. PyTorch's `weights_only` reader runs none of it but what makes tensors; it is
run in a child process, with limits on memory and time, that is handed one file and writes one.
Needs PyTorch.
"""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxft import tensor_file
from jaxft.errors import UserError

SECONDS = 600
"""That the child may take."""

MEMORY = 4.0
"""Times the file's size that the child may hold, and `ROOM` bytes besides."""

ROOM = 6 * 2**30
"""Bytes of address space that PyTorch takes for itself."""

FAILED = 3
"""The child's exit code where the file is at fault; its last line says why."""


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a pickled file, under their keys; nested dicts are joined with dots.

    `state_dict`, the wrapper of old checkpoints, is taken off.

    Raises:
        UserError: PyTorch is not installed, or the file holds anything but tensors, or takes too
            much memory or time.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "tensors.safetensors"
        limit = int(MEMORY * path.stat().st_size) + ROOM
        command = [sys.executable, "-P", "-m", "jaxft.pickled", str(path), str(target), str(limit)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise UserError(f"{path}: was not read within {SECONDS} s") from None
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["the reader was killed"])[-1]
            raise UserError(f"{path}: not converted: {reason}")
        return {name: np.array(array) for name, array in tensor_file.read(target).items()}


def _child(source: str, target: str, limit: str) -> int:
    """What the child process does: reads one file, writes another."""
    try:
        import torch
    except ImportError:
        print("reading pickles needs PyTorch: pip install torch", file=sys.stderr)
        return FAILED
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a crafted file makes the reader raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        print(f"it holds more than tensors, or is damaged: {first}", file=sys.stderr)
        return FAILED
    found = dict(_tensors(content, ""))
    if not found:
        print("there are no tensors in it", file=sys.stderr)
        return FAILED
    tensor_file.write(Path(target), {name: _array(tensor) for name, tensor in found.items()})
    return 0


def _tensors(node: Any, prefix: str) -> Any:
    """(key, tensor) of everything in nested dicts."""
    if isinstance(node, Mapping):
        node = node.get("state_dict", node)
        for key, value in node.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif hasattr(node, "detach"):
        yield prefix, node


def _array(tensor: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:  # NumPy knows it through ml_dtypes alone
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


if __name__ == "__main__":
    sys.exit(_child(*sys.argv[1:]))
