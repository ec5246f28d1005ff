"""Commands on two workers of a real cluster give the files, numbers and errors of one process."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from offtower.cli import app
from offtower.config import parse_config
from offtower.data.log import ParquetLog, write_log
from offtower.execution import Execution
from tests.mappers import content

pytestmark = pytest.mark.ray

ON_RAY = ("--ray", "local", "--workers", "2")
"""Joins the cluster of the session, to which this process is connected."""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def text(arguments: tuple[str | Path, ...], code: int) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated world, drawn by one process, and a trained run."""
    from offtower.training.run import train_run

    folder = tmp_path_factory.mktemp("world")
    simulate = ("simulate", "--items", "60", "--rows", "30000", "--features", "all", "--out")
    text((*simulate, folder / "logs"), 0)
    train_run(
        parse_config(
            {
                "name": "run",
                "runs": str(folder / "runs"),
                "data": {
                    name: str(folder / "logs" / name) for name in ("train", "test", "catalogue")
                },
                "policy": {"embedding_dim": 8},
                "reward_model": {"kind": "factored", "embedding_dim": 4, "epochs": 1, "folds": 2},
                "objective": {"name": "dr"},
                "training": {"epochs": 1, "threads": 1},
            }
        )
    )
    return folder


def test_simulate(ray_cluster: str, world: Path, tmp_path: Path) -> None:
    simulate = ("simulate", "--items", "60", "--rows", "30000", "--features", "all", "--out")
    text((*simulate, tmp_path / "logs", *ON_RAY), 0)
    # The training of `world` has entered itself into its log's ledger.
    drawn = {k: v for k, v in content(world / "logs").items() if "_ledger" not in k}
    assert content(tmp_path / "logs") == drawn


def test_ingest_and_split(ray_cluster: str, world: Path, tmp_path: Path) -> None:
    rows = pa.concat_tables(ParquetLog.open(world / "logs" / "train").tables())
    reward = rows["reward"].to_numpy().copy()
    reward[[5, 29_000]] = np.nan
    column = rows.schema.get_field_index("reward")
    (tmp_path / "source").mkdir()
    for number in range(3):
        part = rows.set_column(column, "reward", pa.array(reward)).slice(number * 10_000, 10_000)
        pq.write_table(part, tmp_path / "source" / f"{number}.parquet", row_group_size=3000)
    manifest = json.loads((world / "logs" / "train" / "_offtower.json").read_text())
    (tmp_path / "schema.yaml").write_text(json.dumps({"log": manifest["schema"]}))
    arguments = ("ingest", tmp_path / "source", "--schema", tmp_path / "schema.yaml", "--out")
    refused = [text((*arguments, tmp_path / "refused", *more), 2) for more in ((), ON_RAY)]
    assert "row 5 of the log: column 'reward' is nan" in refused[0]
    assert refused[0] == refused[1]
    quarantine = ("--split", "time", "--on-bad-rows", "quarantine")
    text((*arguments, tmp_path / "one", *quarantine), 0)
    text((*arguments, tmp_path / "two", *quarantine, *ON_RAY), 0)
    one = content(tmp_path / "one")
    assert sum(name.startswith("quarantine") for name in one) == 2
    assert content(tmp_path / "two") == one


def test_validate(ray_cluster: str, world: Path) -> None:
    arguments = ("validate", world / "logs" / "train", "--catalogue", world / "logs" / "catalogue")
    one = text((*arguments, "--json"), 0)
    assert text((*arguments, "--json", *ON_RAY), 0) == one


def test_evaluate(ray_cluster: str, world: Path) -> None:
    """SNIPS, DR and all the rest, intervals and bootstrap too: the same bits."""
    arguments = ("evaluate", world / "runs" / "run", "--json", "--set", "evaluation.batch_rows=512")
    one = run(*arguments)
    assert one.exit_code in (0, 1, 3)
    two = run(*arguments, *ON_RAY)
    assert (two.exit_code, two.stdout) == (one.exit_code, one.stdout)
    assert "snips" in json.loads(one.stdout)["policies"]["run"]["estimates"]


def test_a_log_of_several_policies(ray_cluster: str, world: Path, tmp_path: Path) -> None:
    """Simulated, and evaluated by the heuristic on the columns of each policy's propensities."""
    simulate = ("simulate", "--items", "60", "--rows", "30000", "--features", "all", "--json")
    betas = ("--beta", "0", "--beta", "1")
    text((*simulate, *betas, "--out", tmp_path / "one"), 0)
    columns = json.loads(text((*simulate, *betas, "--out", tmp_path / "two", *ON_RAY), 0))
    assert content(tmp_path / "two") == content(tmp_path / "one")
    option = f"evaluation.selection.logging_columns={json.dumps(columns['logging_columns'])}"
    arguments = (
        *("evaluate", world / "runs" / "run", "--log", tmp_path / "one" / "test", "--json"),
        *("--set", option, "--set", "evaluation.batch_rows=512"),
        *("--set", "evaluation.selection.models=[]", "--select", "heuristic"),
    )
    one = run(*arguments)
    assert one.exit_code in (0, 1, 3), one.output
    two = run(*arguments, *ON_RAY)
    assert (two.exit_code, two.stdout) == (one.exit_code, one.stdout)
    assert json.loads(one.stdout)["selection"]["run"]["recommended"] == "heuristic"


def test_export(ray_cluster: str, world: Path) -> None:
    arguments = ("export", world / "runs" / "run", "--index", "none", "--json")
    found = [json.loads(text((*arguments, *more), 0)) for more in ((), ON_RAY)]
    one, two = (Path(one["export"]) for one in found)
    for name in ("vectors.npy", "ids.arrow"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert content(two / "items") == content(one / "items")
    # Retrieval of the exports is measured beside the policy value, which workers estimate.
    evaluate = ("evaluate", world / "runs" / "run", "--json", "--retrieval", "5")
    results = [run(*evaluate, *more) for more in ((), ON_RAY)]
    assert results[0].exit_code in (0, 1, 3), results[0].output
    assert results[1].stdout == results[0].stdout
    assert json.loads(results[0].stdout)["retrieval"]["run"][0]["k"] == 5


def test_killed_workers_neither_duplicate_nor_lose_rows(
    ray_cluster: str, world: Path, tmp_path: Path
) -> None:
    """Workers are killed for as long as the command runs; the files are the same bytes."""
    stop, killed = threading.Event(), []

    def kill() -> None:
        while not stop.is_set() and len(killed) < 3:
            for process in psutil.process_iter(["name", "cmdline"]):
                named = " ".join(process.info["cmdline"] or [])
                if "offtower: writing" in named and _ours(process):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    break
            time.sleep(0.02)

    log = ParquetLog.open(world / "logs" / "train")
    many = pa.concat_tables([pa.concat_tables(log.tables())] * 40)
    write_log(tmp_path / "log", [many], log.schema)
    from offtower.data.split import split_log
    from offtower.jobs.mapper import ray_mapper

    one = split_log(tmp_path / "log", tmp_path / "one", by="row")
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with ray_mapper("local", 2) as mapper:
            two = split_log(
                tmp_path / "log", tmp_path / "two", by="row", execution=Execution(mapper)
            )
    finally:
        stop.set()
        thread.join()
    assert killed and one == two
    assert content(tmp_path / "two") == content(tmp_path / "one")


def _ours(process: psutil.Process) -> bool:
    """Whether it belongs to a cluster that this process started."""
    me = psutil.Process()
    return me in process.parents()
