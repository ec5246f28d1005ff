"""Run by test_lost_node.py in a process of its own: two nodes, of which one goes away."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path


def slow(folder: Path, number: int) -> tuple[int, str]:
    """Says where it runs, and takes its time; its result is too large for Ray to keep inline."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    (folder / f"{number}-{node}-{time.time_ns()}").touch()
    time.sleep(0.4)
    return number, "x" * 300_000


def main(folder: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from offtower.jobs.mapper import RayMapper

    arguments = {"num_cpus": 2, "object_store_memory": 90_000_000}
    sockets = tempfile.mkdtemp(prefix="ot-lost-", dir="/tmp")
    head = {**arguments, "num_cpus": 1, "include_dashboard": False, "temp_dir": sockets}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(**arguments)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        seen: list[int] = []

        def lose() -> None:
            while not any(second.node_id in path.name for path in folder.iterdir()):
                time.sleep(0.05)
            time.sleep(0.5)
            # Its processes end without a goodbye, as those of a machine that lost its power.
            for processes in second.all_processes.values():
                for info in processes:
                    info.process.kill()

        thread = threading.Thread(target=lose)
        thread.start()
        for number, _ in RayMapper(3).map(partial(slow, folder), range(16), "waiting"):
            seen.append(number)
        thread.join()
        assert seen == list(range(16)), seen
        started = len(list(folder.iterdir()))
        assert started > 16, "no part ran twice: the node was lost too late to matter"
        print("ok", started)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(sockets, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("RAY_health_check_period_ms", "500")
    os.environ.setdefault("RAY_health_check_failure_threshold", "3")
    main(Path(sys.argv[1]))
