from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offtower.cli import app
from offtower.data import Catalogue, ParquetLog


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.stdout if done.exit_code == 0 else done.output


def test_slates_of_eligible_items(tmp_path: Path) -> None:
    """Rows count rows; the schemas of log and catalogue name what the log was drawn with."""
    code, text = call(
        *("simulate", "--out", tmp_path / "out", "--items", 50, "--rows", 400, "--slate", 4),
        *("--eligible", "regions=3", "--eligible", "days=9", "--eligible", "candidates=10"),
        *("--structure", "standard", "--json"),
    )
    assert code == 0, text
    facts = json.loads(text)
    assert facts["rows"] == {"train": 400, "validation": 80, "test": 80}
    assert 0.0 < facts["logging_value"]["value"] < 4.0
    assert 0.0 < facts["logging_value"]["std_error"] < 0.2
    log = ParquetLog.open(tmp_path / "out" / "train")
    assert log.num_rows == 400
    assert (log.schema.round_id, log.schema.position) == ("round_id", "position")
    section = log.schema.eligible
    assert section is not None and section.log_columns == ("region", "candidates")
    catalogue = Catalogue.open(tmp_path / "out" / "catalogue")
    assert catalogue.schema.eligible == ("regions", "listed_at", "delisted_at")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--eligible", "country=2"), "give each of regions, days, seen, candidates"),
        (("--slate", "60"), "n_items must be at least 60"),
    ],
)
def test_refused_options(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    code, text = call("simulate", "--out", tmp_path / "out", "--items", 50, *options)
    assert code == 2 and message in " ".join(text.split())
