"""Train on two nodes and lose one, or have it drained first; run by tests of lost nodes."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from ray.cluster_utils import Cluster

from offtower.config import parse_config
from offtower.jobs.connect import connect
from offtower.jobs.train import WorkerPlan, train_on_ray
from offtower.metrics import read_metrics


def main(config_path: str, after_step: int, drained: bool) -> None:
    config = parse_config(yaml.safe_load(Path(config_path).read_text(encoding="utf-8")))
    store = 150_000_000
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": store,
            "include_dashboard": False,
        },
    )
    second = cluster.add_node(num_cpus=1, object_store_memory=store)
    cluster.wait_for_nodes()
    act = drain if drained else lose
    threading.Thread(
        target=act, args=(cluster, second, config.run_directory, after_step), daemon=True
    ).start()
    try:
        with connect(cluster.address):
            plan = WorkerPlan((1, 2), timeout=20.0, elastic_check=3600.0)
            manifest = train_on_ray(config, plan)
        print(f"ended with {manifest['workers']} worker(s)")
    finally:
        cluster.shutdown()


def lose(cluster: Cluster, node: Any, run: Path, after_step: int) -> None:
    """Remove the node with its processes once there is a checkpoint of that step."""
    while not any(int(p.name[5:]) >= after_step for p in (run / "checkpoints").glob("step_*")):
        time.sleep(0.02)
    cluster.remove_node(node, allow_graceful=False)


def drain(cluster: Cluster, node: Any, run: Path, after_step: int) -> None:
    """Announce that the node goes away, and remove it after the next checkpoint."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < after_step:
        time.sleep(0.02)
    deadline = time.time_ns() // 1_000_000 + 60_000
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot", deadline)

    def inside_epochs() -> set[int]:
        saved = {int(p.name[5:]) for p in (run / "checkpoints").glob("step_*")}
        return saved - {m["step"] for m in read_metrics(metrics) if m["kind"] == "epoch"}

    while not inside_epochs():
        time.sleep(0.02)
    print("a checkpoint after the notice", flush=True)
    cluster.remove_node(node, allow_graceful=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["drain"])
