"""Train, evaluate and export with `ray job submit` on a local cluster of two nodes.

Ingests the Open Bandit sample, starts two Ray nodes on this machine with token authentication, and
submits three jobs as cluster/submit.sh does. Then runs evaluate and export in one process: the
evaluation and the exported vectors must be bitwise equal. Reports seconds and peak memory
(resident, summed over all processes of the cluster).

    python benchmarks/ray_job.py --json ray_job.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]


def configure(folder: Path) -> Path:
    """Write the quickstart's configuration with paths below `folder`."""
    text = resources.files("offtower.quickstart").joinpath("open_bandit.yaml").read_text("utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    content |= {"name": "open-bandit", "runs": str(folder / "runs"), "objective": {"name": "dr"}}
    content["reward_model"] = {"kind": "factored", "embedding_dim": 8, "epochs": 3, "folds": 2}
    content["data"] = {
        name: str(folder / "data" / name) for name in ("train", "validation", "test", "catalogue")
    }
    path = folder / "open_bandit.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Memory:
    """Sample the summed resident memory of this process's descendants, and keep the peak."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.5):
            total = 0
            for process in me.children(recursive=True):
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)


def offtower(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-P", "-m", "offtower.cli", *(str(one) for one in arguments)]


def run(command: list[str], codes: tuple[int, ...] = (0,)) -> tuple[str, float, float]:
    """Run a command and return its standard output, seconds and peak GiB."""
    began = time.perf_counter()
    with Memory() as memory:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout, time.perf_counter() - began, memory.peak / 2**30


def submit(*arguments: str | Path) -> tuple[str, float, float]:
    """Submit a job as cluster/submit.sh does, without a working directory to upload."""
    ray = str(Path(sys.executable).parent / "ray")
    return run([ray, "job", "submit", "--", *offtower(*arguments, "--ray", "auto")])


def last_json(output: str) -> dict[str, Any]:
    """Return the JSON object in a job's output, which Ray's log lines surround."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    start = plain.index("\n{\n")
    found, _ = json.JSONDecoder().raw_decode(plain[start + 1 :])
    return dict(found)


def start_cluster(folder: Path, cpus: int) -> Any:
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": cpus, "object_store_memory": 150_000_000}
    head = {
        **arguments,
        "include_dashboard": True,
        "dashboard_port": 8385,
        "temp_dir": str(folder),
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**arguments)
    cluster.wait_for_nodes()
    return cluster


def measure(folder: Path, workers: int) -> dict[str, Any]:
    config = configure(folder)
    run(offtower("ingest", "open-bandit:men", "--out", folder / "data", "--split", "time"))
    result: dict[str, Any] = {"workers": workers, "nodes": 2}
    sockets = Path(tempfile.mkdtemp(prefix="ot-job-", dir="/tmp"))
    began = time.perf_counter()
    cluster = start_cluster(sockets, workers)
    try:
        os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:8385"
        with Memory() as memory:
            time.sleep(5)
        result["cluster"] = {
            "seconds": time.perf_counter() - began - 5,
            "idle_memory_gib": memory.peak / 2**30,
        }
        many = ("--workers", str(workers))
        run_path = folder / "runs" / "open-bandit"
        jobs: dict[str, tuple[str | Path, ...]] = {
            "train": ("train", config, *many),
            "evaluate": ("evaluate", run_path, "--json", "--exit-zero", *many),
            "export": ("export", run_path, "--index", "none", "--json", *many),
        }
        said = {}
        for name, arguments in jobs.items():
            said[name], seconds, memory_gib = submit(*arguments)
            result[name] = {"seconds": seconds, "peak_memory_gib": memory_gib}
    finally:
        cluster.shutdown()
        shutil.rmtree(sockets, ignore_errors=True)
    alone, seconds, memory_gib = run(offtower("evaluate", run_path, "--json", "--exit-zero"))
    result["evaluate_in_one_process"] = {"seconds": seconds, "peak_memory_gib": memory_gib}
    one, two = json.loads(alone), last_json(said["evaluate"])
    snips = [found["policies"]["open-bandit"]["estimates"]["snips"] for found in (one, two)]
    result["snips"] = snips[1]["value"]
    result["same_evaluation"] = one == two
    exported, *_ = run(offtower("export", run_path, "--index", "none", "--json"))
    files = [
        Path(found["export"]) / "vectors.npy"
        for found in (json.loads(exported), last_json(said["export"]))
    ]
    result["same_vectors"] = files[0].read_bytes() == files[1].read_bytes()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Both nodes and the jobs' drivers inherit the token from this process.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(Path(temporary), arguments.workers)
    print(json.dumps(result, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2))
    if not (result["same_evaluation"] and result["same_vectors"]):
        raise SystemExit("results of one process and of the cluster differ")


if __name__ == "__main__":
    main()
