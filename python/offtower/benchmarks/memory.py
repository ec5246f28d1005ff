"""Peak memory of training runs with an item-id embedding table, one process per run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from offtower.benchmarks import Settings, world
from offtower.errors import RunError

VARIANTS: dict[str, tuple[str, str]] = {
    "exact, dense AdamW": ("exact", "dense"),
    "mixed, dense AdamW": ("mixed", "dense"),
    "mixed, lazy AdamW": ("mixed", "lazy_adamw"),
    "mixed, row-wise Adagrad": ("mixed", "rowwise_adagrad"),
    "top_k, row-wise Adagrad": ("top_k", "rowwise_adagrad"),
}


def run(settings: Settings) -> dict[str, Any]:
    """Write a log and a catalogue, then train on them once per variant."""
    results: list[dict[str, Any]] = []
    settings.say(
        f"peak resident memory, id embeddings of width {settings.dim}, {world.WIDTH} features"
    )
    for items in settings.items:
        with tempfile.TemporaryDirectory(prefix="offtower-benchmark-") as temporary:
            folder = Path(temporary)
            world.write(folder, settings.batch * settings.steps, items, settings.dim)
            for name in VARIANTS:
                line = {"items": items, "variant": name, **_in_own_process(folder, name, settings)}
                settings.say(
                    f"{items:>12,}  {name:<26}{line['peak_gib']:6.2f} GiB   "
                    f"{line['rows_per_second']:10,.0f} rows/s"
                )
                results.append(line)
    return {"suite": "memory", "batch": settings.batch, "dim": settings.dim, "results": results}


def _in_own_process(folder: Path, variant: str, settings: Settings) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", __name__, str(folder), variant]
    command += [str(settings.batch), str(settings.dim)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunError(f"the run of '{variant}' failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def train(folder: Path, variant: str, batch: int, dim: int) -> dict[str, Any]:
    """Train for one epoch and return the peak memory of this process."""
    from offtower.metrics import read_metrics
    from offtower.training.run import train_run

    mode, updates = VARIANTS[variant]
    config = world.config(
        mode, batch=batch, dim=dim, epochs=1, folder=folder, table_updates=updates
    )
    config.name = variant.replace(", ", "-").replace(" ", "-")
    before = peak_gib()
    train_run(config)
    epoch = read_metrics(config.run_directory / "metrics.jsonl")[-1]
    return {
        "peak_gib": peak_gib(),
        "of_imports_gib": before,
        "rows_per_second": epoch["rows_per_second"],
    }


def peak_gib() -> float:
    """Return the peak resident memory of this process."""
    # getrusage includes the parent's memory at the fork.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    import resource

    # Bytes on macOS, kilobytes elsewhere.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    path, name, rows, width = sys.argv[1:]
    print(json.dumps(train(Path(path), name, int(rows), int(width))))
