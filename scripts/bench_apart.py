"""`bench.py` of systems that do not fit in memory together: each in a process of its own, in turns.

    python scripts/bench_apart.py --model sd15 --latents 32 --batch 1 --steps 3

Takes the options of `bench.py`. Prints the steps of all processes as they end, and a JSON line.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROUNDS, SYSTEMS = 2, ("jaxft", "eager")
"""Processes of each system, one after the other."""


def main() -> None:
    """The program."""
    times: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    losses: dict[str, list[float]] = {}
    for name in SYSTEMS * ROUNDS:
        found = measured(name)
        times[name] += found["ms_of_steps"]
        losses[name] = found["losses"]
        print(f"{name:8}", *found["ms_of_steps"], "ms", flush=True)
    medians = {name: statistics.median(own) for name, own in times.items()}
    ours, theirs = SYSTEMS
    pairs = zip(losses[ours], losses[theirs], strict=True)
    result = {
        "arguments": sys.argv[1:],
        "ms": medians,
        "ratio": round(medians[ours] / medians[theirs], 3),
        "largest_loss_difference": float(f"{max(abs(a / b - 1) for a, b in pairs):.2g}"),
    }
    print(json.dumps(result))


def measured(name: str) -> dict[str, Any]:
    """What `bench.py` says of one system, the only one of its process."""
    command = [sys.executable, str(Path(__file__).with_name("bench.py")), "--alone", name]
    done = subprocess.run([*command, *sys.argv[1:]], stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return {key: next(iter(told[key].values())) for key in ("losses", "ms_of_steps")}


if __name__ == "__main__":
    main()
