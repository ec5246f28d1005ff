"""Time and memory of an evaluation of slates on a large log.

A simulated recommender logs `--rounds` rounds of `--slate` items out of `--items` by popularity and
exploration. A two-tower policy of width `--dim`, trained for a moment, is evaluated on them as by
`offtower evaluate`:

    python benchmarks/slate_evaluation.py --rounds 4000
    python benchmarks/slate_evaluation.py --rounds 1000000 --folder slates --json slates.json

The evaluation runs in its own process for the memory measurement. A folder that holds the log
already is used again. `--profile FILE` writes where the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.simulate import LoggingPolicy, SimulatedWorld, SlateSettings, WorldSettings
from offtower.evaluation.run import evaluate_runs
from offtower.training.run import train_run

_TRAINING_ROUNDS = 100


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write the catalogue and the logs, and train a run."""
    world = SimulatedWorld(
        args.items,
        WorldSettings(8, 8, 8, intercept=-1.0),
        logging=LoggingPolicy("popularity", epsilon=0.5),
        slate=SlateSettings(args.slate),
    )
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    write_log(folder / "train", world.log(_TRAINING_ROUNDS, seed=1), world.log_schema)
    write_log(folder / "test", world.log(args.rounds, seed=2), world.log_schema)
    tower = {"hidden_layer_sizes": [32]}
    data = {part: str(folder / part) for part in ("train", "test", "catalogue")}
    train_run(
        parse_config(
            {
                "name": "run",
                "runs": str(folder),
                "data": data,
                "policy": {"embedding_dim": args.dim, "context_tower": tower, "item_tower": tower},
                "objective": {"name": "weighted_likelihood"},
                "serving": {"k": args.slate, "uniform": args.uniform},
                "training": {"epochs": 1, "measure_terms": False},
            }
        )
    )


def evaluate(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Evaluate once; figures, seconds and peak memory."""
    profile = cProfile.Profile(time.process_time) if args.profile else None
    started = time.perf_counter()
    if profile is not None:
        profile.enable()
    found = evaluate_runs([folder / "run"], overrides=[f"evaluation.batch_rows={args.batch}"])
    if profile is not None:
        profile.disable()
        with args.profile.open("w") as file:
            pstats.Stats(profile, stream=file).sort_stats("cumulative").print_stats(100)
    policy = found.result.policies["run"]
    return {
        "seconds": time.perf_counter() - started,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "rows": found.log["rows"],
        "estimates": {name: e.to_dict() for name, e in policy.estimates.items()},
        "notes": found.notes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4_000)
    parser.add_argument("--slate", type=int, default=10, help="items of a round")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--uniform", type=float, default=0.0, help="share of uniform draws")
    parser.add_argument("--batch", type=int, default=4096, help="rows of a batch")
    parser.add_argument("--folder", type=Path, help="keep the log and the run here")
    parser.add_argument("--profile", type=Path, help="write the time by function to this file")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.evaluate:
        print(json.dumps(evaluate(args, args.evaluate)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "run" / "policy").exists():
            prepare(args, folder)
        command = [sys.executable, __file__, *sys.argv[1:], "--evaluate", str(folder)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(printed.splitlines()[-1])
    result["arguments"] = {key: str(value) for key, value in vars(args).items()}
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
