"""The validity benchmark: exact values, draws, resumption, the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from offtower.benchmarks import Settings
from offtower.benchmarks.validity.measure import ESTIMATORS, measure, share
from offtower.benchmarks.validity.suite import run, select
from offtower.benchmarks.validity.worlds import Cell, World, cells
from offtower.errors import ConfigError


def settings(out: Path, **more: object) -> Settings:
    return Settings(items=(), dim=2, batch=2, steps=1, peers=False, out=out, **more)  # type: ignore[arg-type]


def test_cells_have_distinct_names_and_are_at_most_sixty() -> None:
    names = [cell.name for cell in cells()]
    assert len(set(names)) == len(names) <= 60


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.name)
def test_null_policies_have_the_logging_policys_value(cell: Cell) -> None:
    world = World.of(cell)
    assert world.value("null") == pytest.approx(world.logging_value, rel=1e-12)
    assert world.value("value") >= world.value("better") > world.logging_value
    for policy in (*world.logging, *world.policies.values()):
        assert policy.min() > 0.0
        np.testing.assert_allclose(policy.sum(axis=1), 1.0)
    if cell.reward != "lognormal":
        assert min(world.start.min(), world.target.min()) >= 0.0
        assert max(world.start.max(), world.target.max()) <= 1.0


@pytest.mark.parametrize(
    "cell",
    [
        Cell("benign", 2000),
        Cell("benign", 2000, 100),
        Cell("benign", 2000, reward="graded"),
        Cell("benign", 2000, reward="revenue"),
        Cell("benign", 2000, drift=0.5),
        Cell("moderate", 2000, loggers=2),
    ],
    ids=lambda cell: cell.name,
)
def test_logs_have_the_stated_means(cell: Cell) -> None:
    """Means of 40 logs, by log: within 4.5 standard errors of the truth (7e-6 per check)."""
    world = World.of(cell)
    logs = list(world.logs(40, seed=1))
    found = {
        "reward": (np.array([log["value"].reward.mean() for log in logs]), world.logging_value),
        "weight": (np.array([log["value"].importance_weight.mean() for log in logs]), 1.0),
        "value": (
            np.array([(r := log["value"]).importance_weight @ r.reward / r.n for log in logs]),
            world.value("value"),
        ),
    }
    for name, (values, truth) in found.items():
        error = values.std(ddof=1) / np.sqrt(len(values))
        # Student's t with 39 degrees exceeds 5.1 as rarely as a normal number exceeds 4.5.
        assert abs(values.mean() - truth) < 5.1 * error, name


def test_a_drifting_log_lies_before_the_asked_future() -> None:
    world = World.of(Cell("benign", drift=0.5, target="future"))
    period = World.of(Cell("benign", drift=0.5))
    assert world.logging_value != pytest.approx(period.logging_value, rel=1e-3)
    np.testing.assert_allclose(period.target, 0.5 * (period.start + period.end))


def test_clustered_cells_have_verdicts_and_no_bernstein() -> None:
    lines = measure(Cell("benign", 800, 40), 2, 0)
    assert {line["method"] for line in lines} == {"gamma", "normal"}
    assert all({"coverage", "false_go", "power", "abstention"} <= set(line) for line in lines)


def test_a_run_resumes_and_writes_every_cell(tmp_path: Path) -> None:
    chosen = ("benign-n200-*", "heavy-n2000-hardly_any-*")
    first = run(settings(tmp_path, cells=chosen[:1], logs=2))
    assert [cell["cell"] for cell in first["cells"]] == ["benign-n200-binary-shrunk"]
    path = tmp_path / "benign-n200-binary-shrunk.json"
    before = path.stat().st_mtime_ns
    said: list[str] = []
    run(settings(tmp_path, cells=chosen, logs=2, say=said.append))
    assert path.stat().st_mtime_ns == before
    assert any(text.startswith("heavy-n2000-hardly_any") for text in said)
    table = (tmp_path / "table.md").read_text()
    assert table.count("| benign-n200-binary-shrunk |") == len(ESTIMATORS)
    assert "heavy-n2000-hardly_any-shrunk" in table
    assert json.loads((tmp_path / "summary.json").read_text())["pooled"]["snips gamma"]["logs"] == 4
    run(settings(tmp_path, cells=chosen[:1], logs=3))
    found = json.loads(path.read_text())
    assert found["logs"] == 3 and [one["logs"] for one in found["rounds"]] == [2, 1]
    parts = [one["lines"][0]["coverage"][0] for one in found["rounds"]]
    assert found["lines"][0]["coverage"][0] == pytest.approx((2 * parts[0] + parts[1]) / 3)


def test_unknown_cells_are_refused_with_the_known() -> None:
    with pytest.raises(ConfigError, match="benign-n200-binary-shrunk"):
        select(("nothing",))


def test_a_share_of_none_has_an_error_above_zero() -> None:
    mean, error = share(np.zeros(100))
    assert (mean, error) == (0.0, pytest.approx(np.sqrt(1 / 102 * 101 / 102 / 100)))
