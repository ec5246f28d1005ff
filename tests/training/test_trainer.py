"""The loop's edges: broken gradients, bad rows, interrupts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from offtower.config import to_yaml
from offtower.data import BadRowsError, ParquetLog, write_log
from offtower.errors import RunError
from offtower.metrics import read_metrics
from offtower.objectives import LoggedRows, Objective, ObjectiveValue, Reduction
from offtower.run_directory import RunDirectory
from offtower.training.run import train_run
from tests.training.conftest import make_config
from tests.training.distributed.processes import start_offtower


class Exploding(Objective):
    """A user's own objective, by import path, whose loss turns into NaN in the second epoch."""

    name = "exploding"

    def __init__(self, after: int = 20) -> None:
        self.calls, self.after = 0, after

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        self.calls += 1
        factor = float("nan") if self.calls > self.after else 1.0
        value = rows.weight() * rows.reward * factor
        return ObjectiveValue(-reduction.mean(value), reduction.average(value))


def test_a_loss_that_is_not_finite_stops_with_advice(simulated: Path, tmp_path: Path) -> None:
    objective = {"name": f"{__name__}:Exploding", "arguments": {"after": 30}}
    config = make_config(simulated, tmp_path, "a", objective=objective)
    with pytest.raises(RunError, match=r"step 31 \(epoch 2\) gave a loss of nan.*learning_rate"):
        train_run(config)
    assert list((config.run_directory / "checkpoints").glob("step_*"))


def with_bad_rows(simulated: Path, out: Path, part: str) -> None:
    log = ParquetLog.open(simulated / part)
    table = pa.concat_tables(log.tables())
    pscore = table.column("pscore").to_numpy().copy()
    pscore[[5, 250]] = 0.0
    place = table.column_names.index("pscore")
    write_log(out, [table.set_column(place, "pscore", pa.array(pscore))], log.schema, 100)


def test_bad_rows_are_refused_or_set_aside_and_counted(simulated: Path, tmp_path: Path) -> None:
    for part in ("train", "validation"):
        with_bad_rows(simulated, tmp_path / part, part)
    overrides = [f"data.train={tmp_path / 'train'}", f"data.validation={tmp_path / 'validation'}"]
    config = make_config(simulated, tmp_path / "runs", "a", *overrides, "training.epochs=2")
    with pytest.raises(BadRowsError, match="row 5 of the log"):
        train_run(config)
    config = make_config(
        *(simulated, tmp_path / "runs", "b"),
        *(*overrides, "training.epochs=2", "data.on_bad_rows=quarantine"),
    )
    train_run(config)
    manifest = RunDirectory(config.run_directory).manifest()
    assert manifest["training_rows"] == 598
    assert manifest["quarantined_rows"] == {"train": 2, "validation": 2}


@pytest.mark.parametrize("name", ["regression", "snips", "weighted_likelihood"])
def test_objectives_train_from_the_config(simulated: Path, tmp_path: Path, name: str) -> None:
    config = make_config(simulated, tmp_path, name, f"objective.name={name}", "training.epochs=2")
    result = train_run(config)
    lines = read_metrics(config.run_directory / "metrics.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert result.epochs == len(epochs) == 2
    assert all(np.isfinite(line["loss"]) for line in epochs)
    assert all(line["entropy"] is not None for line in epochs)
    # Nothing was fitted that this objective does not need.
    assert not (config.run_directory / "reward_model").exists()


def test_step_lines_are_written_every_kth_step_or_never(simulated: Path, tmp_path: Path) -> None:
    steps = {}
    for every in (7, None):
        name = f"every-{every}"
        config = make_config(simulated, tmp_path, name, "objective.name=ips", "training.epochs=1")
        config.training.log_every_steps = every
        train_run(config)
        lines = read_metrics(config.run_directory / "metrics.jsonl")
        steps[every] = [line["step"] for line in lines if line["kind"] == "step"]
    assert steps == {7: [1, 8, 15], None: []}


def test_an_interrupt_ends_with_code_130_and_can_be_resumed(
    simulated: Path, tmp_path: Path
) -> None:
    config = make_config(simulated, tmp_path, "a", "training.epochs=300")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    process = start_offtower(["train", str(path)], tmp_path / "errors")
    metrics = config.run_directory / "metrics.jsonl"
    began = time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() - began < 60:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=60)
    process.kill()
    text = (tmp_path / "errors").read_text()
    assert process.exitcode == 130, text
    assert "Traceback" not in text
    assert "--resume" in text


def test_a_run_validated_by_a_dense_reward_model_resumes(simulated: Path, tmp_path: Path) -> None:
    """Its regressors are not stored: a resumed run must have them again."""
    dense = {"kind": "dense", "estimator": "sklearn.linear_model:Ridge", "folds": 2}
    overrides = ("training.validation_estimator=dr", "training.epochs=2", "objective.name=ips")
    config = make_config(simulated, tmp_path, "a", *overrides, reward_model=dense)
    first = train_run(config)
    newest = sorted(RunDirectory(config.run_directory).checkpoints.glob("step_*"))[-1]
    newest.rename(newest.with_name("put-aside"))
    again = train_run(config, resume=True)
    assert again.validation == first.validation
    assert again.selected_step == first.selected_step
