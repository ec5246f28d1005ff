"""Run a campaign: python -m tests.faults --number 1000 --seed 0 --json faults.json"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.faults.campaign import BAD, Injection, campaign, table
from tests.faults.world import build, subjects


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="kinds of files whose name has this text")
    arguments = parser.parse_args()
    chosen = [one for one in subjects() if arguments.only in one.name]
    found: list[Injection] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="offtower-faults-") as folder:
        root = Path(folder).resolve() / "world"
        root.mkdir()
        build(root)
        print(f"built in {time.monotonic() - began:.0f} s", file=sys.stderr)
        for one in campaign(root, chosen, arguments.number, arguments.seed):
            found.append(one)
            if one.outcome in BAD:
                print(one, file=sys.stderr, flush=True)
            if len(found) % 100 == 0:
                print(
                    f"{len(found)}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True
                )
    print(table(found))
    if arguments.json is not None:
        lines = [{**asdict(one), "outcome": one.outcome.name} for one in found]
        arguments.json.write_text(json.dumps(lines, indent=1))
    return int(any(one.outcome in BAD for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
