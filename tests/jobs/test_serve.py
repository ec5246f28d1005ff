"""The server on Ray Serve: answers through its proxy, and a log that is complete when it stops."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from offtower.config import parse_config
from offtower.data.log import ParquetLog
from offtower.errors import ConfigError
from offtower.jobs.serve import application
from offtower.retrieval import ExportOptions, export_run
from offtower.training.run import train_run

pytestmark = pytest.mark.ray


def test_ray_serve_answers_and_finishes_the_log(
    ray_cluster: str, simulated: Path, tmp_path: Path
) -> None:
    from ray import serve

    config = parse_config(
        {
            "name": "served",
            "runs": str(tmp_path / "runs"),
            "data": {name: str(simulated / name) for name in ("train", "catalogue")},
            "objective": {"name": "weighted_likelihood"},
            "training": {"epochs": 1, "batch_size": 256, "threads": 1},
        }
    )
    train_run(config)
    export_run(config.run_directory, ExportOptions(index=None, onnx=False, contexts=50))
    with pytest.raises(ConfigError, match="rnu"):
        application({"rnu": "x"})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "log"
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(application({"run": str(config.run_directory), "log": str(log)}), name="offtower")

        def ask(path: str, content: object = None) -> dict[str, object]:
            body = None if content is None else json.dumps(content).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body)
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: dict[str, object] = json.load(answer)
                return found

        assert ask("/health")["status"] == "ok"
        opened = ParquetLog.open(simulated / "train")
        names = [*(spec.source for spec in opened.schema.context), "user_id"]
        contexts = next(opened.tables()).slice(0, 3).select(names).to_pylist()
        answers = ask("/sample", {"contexts": contexts, "k": 2})["contexts"]
        assert isinstance(answers, list)
        rounds = [one["round_id"] for one in answers]
    finally:
        serve.shutdown()
    (folder,) = (one for one in log.iterdir() if one.is_dir() and not one.name.startswith("."))
    assert sorted(set(pq.read_table(folder).column("round_id").to_pylist())) == sorted(rounds)
