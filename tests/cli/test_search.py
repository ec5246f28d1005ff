"""Search, draws and retrieval quality from the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from offtower.checksums import describe_files
from offtower.cli import app
from offtower.config import ServingConfig
from offtower.errors import DataError
from offtower.evaluation.frontier import write_serving
from offtower.retrieval import Retriever, decisions_table
from offtower.retrieval.manifest import read_manifest, write_manifest

ONE = '{"x": [0.5, -1.0, 0.25]}'


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 items with integer ids, trained for a moment and exported."""
    folder = tmp_path_factory.mktemp("search")
    logs = folder / "logs"
    made = call("simulate", "--out", str(logs), "--items", "60", "--rows", "600")
    assert made.exit_code == 0, made.output
    config = {
        "name": "mine",
        "runs": str(folder / "runs"),
        "data": {part: str(logs / part) for part in ("train", "validation", "test", "catalogue")},
        "objective": {"name": "ips"},
        "training": {"epochs": 1, "batch_size": 64, "threads": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert call("train", str(folder / "config.yaml")).exit_code == 0
    assert call("export", str(folder / "runs" / "mine")).exit_code == 0
    return folder / "runs" / "mine"


@pytest.fixture(scope="module")
def contexts(run: Path) -> Path:
    return run.parents[1] / "logs" / "test"


def test_terminal_output_has_one_line_per_item(run: Path, contexts: Path) -> None:
    found = call("search", str(run), "--contexts", str(contexts), "-k", "3", "--exact")
    lines = found.stdout.splitlines()
    assert found.exit_code == 0
    rows = pq.read_table(contexts).num_rows
    assert sum(line.startswith("context ") for line in lines) == rows
    assert len(lines) == 4 * rows and "score" in lines[1]
    drawn = call("search", str(run), "--contexts", str(contexts), "-k", "2", "--sample")
    first = drawn.stdout.splitlines()[1]
    # Sixty items are all scored: pscore is known exactly, and says so.
    assert first.split()[0] == "1" and first.endswith("exact") and "pscore 0." in first


@pytest.mark.parametrize("mode", ["softmax", "cells", "exact"])
def test_each_mode_writes_its_log(run: Path, contexts: Path, tmp_path: Path, mode: str) -> None:
    log = tmp_path / "served" / "day.parquet"
    arguments = ("search", str(run), "--contexts", str(contexts), "--sample", "-k", "3")
    arguments += ("--mode", mode, "--seed", "1")
    result = call(*arguments, "--log", str(log), "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    table = pq.read_table(log)
    rows = pq.read_table(contexts).num_rows
    assert len(content["contexts"]) == rows and table.num_rows == 3 * rows
    assert len(set(table.column("round_id").to_pylist())) == rows
    flat = [p for row in content["contexts"] for p in row["pscore"]]
    np.testing.assert_allclose(table.column("pscore").to_numpy(), flat)
    # A row's draws are not its neighbors': one generator goes through all batches.
    assert len({tuple(row["items"]) for row in content["contexts"]}) > rows / 2
    assert "exists already" in refused(*arguments, "--log", str(log))
    assert [p.name for p in log.parent.iterdir() if p.name.startswith(".")] == []


def test_shorter_and_empty_rounds_are_counted(run: Path, tmp_path: Path) -> None:
    log, one = tmp_path / "day.parquet", json.dumps({"context": [0.1] * 8})
    all_but_2 = ",".join(map(str, range(58)))
    arguments = ("search", str(run), "--contexts", one, "--sample", "-k", "3", "--seed", "1")
    found = call(*arguments, "--exclude", all_but_2, "--log", str(log), "--json")
    assert found.exit_code == 0, found.output
    content = json.loads(found.stdout)
    assert content["rounds"] == {"shorter": 1, "empty": 0}
    assert sorted(content["contexts"][0]["items"]) == [58, 59]
    assert pq.read_table(log).column("position").to_pylist() == [0, 1]
    assert "1 contexts have fewer than 3 items" in found.stderr

    every = ("--exclude", f"{all_but_2},58,59")
    assert "context 0: filters leave 0 of 60 items" in refused(*arguments, *every)
    found = call(*arguments, *every, "--on-empty", "skip", "--log", str(tmp_path / "none.parquet"))
    assert found.exit_code == 0 and "1 contexts have no item" in " ".join(found.stderr.split())
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


def test_decisions_have_no_outcome_of_the_old_log(
    run: Path, contexts: Path, tmp_path: Path
) -> None:
    """Contexts out of a log bring its rewards, which belong to the items that it showed."""
    log = tmp_path / "day.parquet"
    arguments = ("--contexts", str(contexts), "--sample", "--seed", "1", "--log", str(log))
    assert call("search", str(run), *arguments).exit_code == 0
    old, new = pq.read_table(contexts), pq.read_table(log)
    assert {"reward", "pscore"} <= set(old.column_names) and "reward" not in new.column_names
    schema = yaml.safe_load((tmp_path / "day.schema.yaml").read_text())
    catalogue = read_manifest_of(run)["catalogue"]["schema"]
    assert schema["catalogue"] == catalogue and catalogue["features"]
    items = run.parents[1] / "logs" / "catalogue"
    ingest = ("ingest", str(log), "--schema", str(tmp_path / "day.schema.yaml"))
    ingest += ("--catalogue", str(items / "part-00000.parquet"), "--out", str(tmp_path / "taken"))
    assert "no outcome was joined" in refused(*ingest)

    # Joined with clicks of some rounds, it is taken, with the catalogue's features.
    clicks = new.select(["round_id", "position"]).slice(0, 40)
    pq.write_table(clicks, tmp_path / "clicks.parquet")
    joined = ("join", str(log), str(tmp_path / "clicks.parquet"), "--rule", "any")
    joined += ("--out", str(tmp_path / "joined.parquet"))
    made = call(*joined)
    assert made.exit_code == 0, made.output
    joined_schema = tmp_path / "joined.schema.yaml"
    content = yaml.safe_load(joined_schema.read_text())
    content["log"]["outcomes"] = {"maturity": "0s", "missing": 0}
    joined_schema.write_text(yaml.safe_dump(content))
    ingest = (
        "ingest",
        str(tmp_path / "joined.parquet"),
        "--schema",
        str(joined_schema),
        *ingest[4:],
    )
    taken = call(*ingest, "--json")
    assert taken.exit_code == 0, taken.output
    assert json.loads(taken.stdout)["notes"] == []
    reward = pq.read_table(tmp_path / "taken" / "log").column("reward").to_numpy()
    assert reward.sum() == 40 and len(reward) == old.num_rows


def test_two_calls_at_one_time_share_no_round(run: Path, contexts: Path) -> None:
    retriever = Retriever.open(run)
    table = pq.read_table(contexts).slice(0, 4)
    parts = [
        decisions_table(
            retriever, table, retriever.sample(table, 2, seed=seed), served_at=datetime(2026, 1, 1)
        )
        for seed in (1, 2)
    ]
    rounds = pa.concat_tables(parts).column("round_id").to_pylist()
    assert len(set(rounds)) == 8 and all(rounds.count(one) == 2 for one in rounds)
    with pytest.raises(DataError, match="4 distinct round ids"):
        decisions_table(
            retriever,
            table,
            retriever.sample(table, 2, seed=1),
            round_id=pa.array(["a", "a", "b", "c"]),
        )


def read_manifest_of(run: Path) -> dict[str, Any]:
    export = run / "export"
    return read_manifest(export / (export / "CURRENT").read_text().strip())


def test_results_do_not_depend_on_the_batch_size(
    run: Path, contexts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("search", str(run), "--contexts", str(contexts), "--sample", "--seed", "4")
    whole = json.loads(call(*arguments, "--json").stdout)["contexts"]
    monkeypatch.setattr("offtower.cli.search._BATCH", 7)
    parts = json.loads(call(*arguments, "--json").stdout)["contexts"]
    assert [row["items"] for row in parts] == [row["items"] for row in whole]
    # A tower's rounding depends on how many rows it gets.
    np.testing.assert_allclose(
        [row["pscore"] for row in parts], [row["pscore"] for row in whole], rtol=1e-5
    )


FORGED = [
    "a\n     1  real  score 9.0000",
    "b\r\x1b[2K forged",
    "c\u2028d",
    "e\x85f",
    "g\x7f",
    '"quoted"',
    "two words",
    "ünï",
    "back\\n",
]


def test_ids_cannot_forge_lines(tmp_path: Path, run: Path, contexts: Path) -> None:
    """Control characters in ids are escaped for the terminal; JSON and the log have them as is."""
    export = tmp_path / "export"
    shutil.copytree(run / "export", export)
    version = export / (export / "CURRENT").read_text().strip()
    schema = pa.schema([("item_id", pa.large_string())])
    ids = [*FORGED, *(f"item-{number}" for number in range(len(FORGED), 60))]
    with pa.ipc.new_file(version / "ids.arrow", schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(ids, pa.large_string())], schema=schema))
    manifest = read_manifest(version)
    manifest["vectors"]["text_ids"] = True
    manifest["files"] = describe_files(version, manifest["files"])
    write_manifest(version, manifest)
    arguments = ("search", str(export), "--contexts", str(contexts), "-k", "60")
    lines = call(*arguments, "--exact").stdout.split("\n")
    rows = pq.read_table(contexts).num_rows
    assert len(lines) == 61 * rows + 1 and lines[-1] == ""
    assert all(line.isprintable() for line in lines)
    shown = {line[8:].rsplit("  score ", 1)[0] for line in lines[1:61]}
    assert {json.loads(s) if s.startswith('"') else s for s in shown} == set(ids)
    assert {"two words", "ünï", "back\\n"} < shown
    log = tmp_path / "day.parquet"
    drawn = call(*arguments, "--sample", "--json", "--log", str(log))
    content = json.loads(drawn.stdout)["contexts"]
    assert all(set(row["items"]) == set(ids) for row in content)
    assert set(pq.read_table(log).column("action").to_pylist()) == set(ids)


def test_a_failure_leaves_no_log(run: Path, tmp_path: Path) -> None:
    bad = tmp_path / "contexts.parquet"
    good = pq.read_table(run.parents[1] / "logs" / "test").slice(0, 3)
    pq.write_table(good.drop_columns([good.column_names[0]]), bad)
    log = tmp_path / "day.parquet"
    message = refused("search", str(run), "--contexts", str(bad), "--sample", "--log", str(log))
    assert "no column" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["contexts.parquet"]


@pytest.mark.parametrize("sample", [False, True])
def test_errors_of_a_later_batch_say_where_it_begins(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: bool
) -> None:
    table = pq.read_table(run.parents[1] / "logs" / "test").slice(0, 10)
    name = "context"
    column = table.column(name).to_pylist()
    column[8] = [float("nan")] * len(column[8])
    at = table.column_names.index(name)
    table = table.set_column(at, name, pa.array(column, table.column(name).type))
    pq.write_table(table, tmp_path / "contexts.parquet")
    arguments = ["search", str(run), "--contexts", str(tmp_path / "contexts.parquet"), "-k", "2"]
    arguments += ["--sample"] if sample else []
    here = refused(*arguments)
    assert "context 8 has no" in here and "counting from" not in here
    monkeypatch.setattr("offtower.cli.search._BATCH", 6)
    there = refused(*arguments)
    assert "counting from context 6 as 0: context 2 has no" in there


def test_filters_apply_and_invalid_arguments_raise(run: Path, contexts: Path) -> None:
    arguments = ("search", str(run), "--contexts", str(contexts))
    result = json.loads(call(*arguments, "-k", "60", "--exclude", "3, 17", "--json").stdout)
    assert all(set(row["items"]) == set(range(60)) - {3, 17} for row in result["contexts"])
    assert "ids are integers" in refused(*arguments, "--exclude", "3,lamp")
    assert "k must lie in [1, 60]" in refused(*arguments, "-k", "61")
    assert "not valid JSON" in refused("search", str(run), "--contexts", "[1, 2]")


def test_evaluate_reports_retrieval_quality(run: Path) -> None:
    result = call("evaluate", str(run), "--retrieval", "5", "--retrieval", "60", "--json")
    assert result.exit_code in (0, 1, 3), result.output
    five, all_items = json.loads(result.stdout)["retrieval"]["mine"]
    assert 0.0 <= five["recall"] <= 1.0 and five["index_recall"] is None
    assert all_items["recall"] == 1.0 and all_items["coverage"] == 1.0
    html = (run / "report.html").read_text()
    assert "Retrieval from the whole catalogue" in html
    shown = call("evaluate", str(run), "--retrieval", "5")
    assert "NDCG" in shown.output and "coverage" in shown.output
    assert "must lie in [1, 60]" in refused("evaluate", str(run), "--retrieval", "61")


def test_search_serves_as_the_run_says(run: Path, contexts: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "mine")
    mine, given = str(tmp_path / "mine"), ("--contexts", str(contexts), "--json")
    alone = call("search", mine, "--contexts", str(contexts), "-k", "1")
    assert "serving.mode to top_k" in " ".join(alone.stderr.split())
    write_serving(tmp_path / "mine", ServingConfig(k=3, mode="top_k"))
    # The export serves as before, and everything says so.
    drawn = call("search", mine, *given, "--sample")
    assert len(json.loads(drawn.stdout)["contexts"][0]["items"]) == 1
    assert "export again" in " ".join(drawn.stderr.split())
    found = call("evaluate", mine, "--retrieval", "5", "--json")
    notes = " ".join(json.loads(found.stdout)["notes"])
    assert "export again" in notes and "always shows its 3 best items" in notes
    assert call("export", mine).exit_code == 0
    shown = call("search", mine, *given, "--sample", "--mode", "exact")
    assert "export again" not in shown.stderr
    best = json.loads(call("search", mine, *given, "-k", "3", "--exact").stdout)["contexts"]
    rows = json.loads(shown.stdout)["contexts"]
    assert [row["items"] for row in rows] == [row["items"] for row in best]
    assert all(row["pscore"] == [1.0, 1.0, 1.0] for row in rows)


_IMPORTED = """
import json, sys
from offtower.cli import app
try:
    for arguments in json.loads(sys.argv[1]):
        app(arguments, standalone_mode=False)
finally:
    names = ("pandas", "scipy", "sklearn", "matplotlib", "jinja2", "ray", "faiss", "obp", "onnx")
    print(json.dumps([name for name in names if name in sys.modules]), file=sys.stderr)
"""


def test_a_search_imports_no_package_it_does_not_use(run: Path, contexts: Path) -> None:
    """Contexts as JSON and in a file."""
    given = (json.dumps({"context": [0.5] * 8}), str(contexts))
    searches = [["search", str(run), "--contexts", one] for one in given]
    command = [sys.executable, "-c", _IMPORTED, json.dumps(searches)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("context 0\n") == 2
    assert json.loads(done.stderr.splitlines()[-1]) == []
