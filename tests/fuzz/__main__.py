"""`python -m tests.fuzz --seconds 120`: run new cases of every target in turn until time is over.

A failing case is printed with its target and seed, and added to seeds.json, which the suite runs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import traceback
from itertools import count
from pathlib import Path

from tests.fuzz.targets import TARGETS, run_case

SEEDS = Path(__file__).parent / "seeds.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--seed", type=int, default=None, help="first seed; the clock without it")
    arguments = parser.parse_args()
    first = int(time.time()) if arguments.seed is None else arguments.seed
    targets = arguments.target or sorted(TARGETS)
    ends, cases, failures = time.monotonic() + arguments.seconds, dict.fromkeys(targets, 0), []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in count(first):
            for target in targets:
                try:
                    run_case(target, seed, Path(scratch) / "case")
                except Exception:
                    failures.append((target, seed))
                    print(f"FAILED {target} {seed}\n{traceback.format_exc()}", flush=True)
                cases[target] += 1
            if time.monotonic() > ends or len(failures) >= 20:
                break
    if failures and "CI" not in os.environ:
        kept = json.loads(SEEDS.read_text(encoding="utf-8"))
        kept += [list(failure) for failure in failures if list(failure) not in kept]
        SEEDS.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    counted = ", ".join(f"{number} {target}" for target, number in cases.items())
    print(f"{counted}; first seed {first}; {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
