"""Metrics lines across resumptions."""

from __future__ import annotations

from pathlib import Path

import pytest

from offtower.metrics import MetricsLog, read_metrics


def test_a_run_that_died_between_an_epochs_line_and_its_checkpoint(tmp_path: Path) -> None:
    """The checkpoint stands at the epoch's last batch; the line will be written again."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.restart()
    for line in (
        {"kind": "step", "step": 1, "epoch": 0},
        {"kind": "epoch", "step": 2, "epoch": 0},
        {"kind": "step", "step": 3, "epoch": 1},
        {"kind": "epoch", "step": 4, "epoch": 1},
    ):
        log.write(line)
    again = MetricsLog(path)
    again.resume_at(step=4, epoch=1)
    assert [(x["kind"], x["step"]) for x in read_metrics(path)] == [
        ("step", 1),
        ("epoch", 2),
        ("step", 3),
    ]
    again.resume_at(step=2, epoch=1)
    assert [x["step"] for x in again.epochs()] == [2]


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1, "epoch": 0}\n{"kind": "st')
    assert len(read_metrics(path)) == 1
    MetricsLog(path).resume_at(step=5, epoch=0)
    assert path.read_text().count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{}",
        "[1]",
        '{"kind": "epoch", "step": "x", "epoch": 0}',
        '{"kind": [], "step": 1, "epoch": 0}',
    ],
)
def test_a_hostile_line_is_left_out(tmp_path: Path, text: str) -> None:
    good = '{"kind": "epoch", "step": 1, "epoch": 0}'
    (tmp_path / "metrics.jsonl").write_text(f"{text}\n{good}\n")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "epoch", "step": 1, "epoch": 0}]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"kind": "step", "step": 1, "loss": float("nan"), "inner": {"low": float("-inf")}})
    assert read_metrics(tmp_path / "m.jsonl")[0] == {
        "kind": "step",
        "step": 1,
        "loss": None,
        "inner": {"low": None},
    }
