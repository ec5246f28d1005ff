"""Train on two nodes and lose one; run by test_lost_node."""

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


def main(config_path: str, after_step: int) -> None:
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
    threading.Thread(
        target=lose, args=(cluster, second, config.run_directory, after_step), daemon=True
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


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
