"""A run whose logs and catalogue are in a store: the policy, verdict and vectors of a local one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from offtower.cli import app
from offtower.data import copies
from offtower.data.location import Location
from offtower.data.parquet import read_footer
from offtower.evaluation.run import evaluate_runs
from offtower.retrieval.export import export_run
from offtower.retrieval.export_options import ExportOptions
from offtower.training.run import train_run
from tests.stores import Unruly, failing_reads, unruly
from tests.training.conftest import make_config
from tests.training.test_resume import assert_same_policy

OPTIONS = ("training.epochs=2", "reward_model.epochs=1")
PARTS = ("train", "validation", "test", "catalogue")


@pytest.fixture
def store(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Unruly, tuple[str, ...]]:
    """A store with the files of `simulated`, and the settings that name them."""
    handler, root = unruly(monkeypatch, tmp_path / "store")
    monkeypatch.setenv(copies.FOLDER, str(tmp_path / "cache"))
    for name in PARTS:
        for found in Location.of(simulated / name).files():
            assert found.location.local is not None
            (Location.of(root) / "logs" / name / found.name).send(found.location.local)
    return handler, tuple(f"data.{name}={root}/logs/{name}" for name in PARTS)


@pytest.mark.usefixtures("no_graphs")
def test_train_evaluate_export(
    simulated: Path,
    store: tuple[Unruly, tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store fails at every fourth read."""
    handler, places = store
    text = "AWS Error SLOW_DOWN during GetObject operation"
    handler.before = failing_reads(monkeypatch, 4, text)
    near = make_config(simulated, tmp_path / "near", "a", *OPTIONS)
    far = make_config(simulated, tmp_path / "far", "a", *OPTIONS, *places)
    train_run(near)
    train_run(far)
    assert far.data.test is not None
    assert_same_policy(far.run_directory, near.run_directory)
    one, two = (evaluate_runs([c.run_directory]).to_dict() for c in (near, far))
    assert two["log"].pop("path") == far.data.test and one["log"].pop("path") == near.data.test
    catalogues = [one["log"].pop("catalogue") for one in (one, two)]
    assert catalogues == [str(near.data.catalogue), str(far.data.catalogue)]
    assert list(one.pop("runs")) == list(two.pop("runs"))
    assert two.pop("title") == far.data.test and one.pop("title") == near.data.test
    assert json.dumps(two, default=str) == json.dumps(one, default=str)
    options = ExportOptions(index=None, contexts=50)
    vectors = [np.load(export_run(c.run_directory, options) / "vectors.npy") for c in (near, far)]
    np.testing.assert_array_equal(*vectors)
    served = far.data.test.replace("logs/test", "served/today.parquet")
    arguments = ("search", str(far.run_directory), "--contexts", far.data.test, "-k", "2")
    done = CliRunner().invoke(app, [*arguments, "--sample", "--log", served])
    assert done.exit_code == 0, done.output
    groups = read_footer(Location.of(served)).row_groups
    assert sum(rows for rows, _ in groups) == 2 * 300
    assert b"pscore" in Location.of(served.replace(".parquet", ".schema.yaml")).read_bytes()
    # A log is read in place; of the catalogue there is one copy.
    assert len(list((tmp_path / "cache").glob("*/data"))) == 1
