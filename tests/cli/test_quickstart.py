"""End-to-end test of `offtower quickstart` with two objectives; `auto` takes most of its time.

`.ci/run` runs `make quickstart` itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offtower import quickstart
from offtower.cli import app


@pytest.fixture(scope="module", autouse=True)
def lighter() -> None:
    """This report has its charts."""


def test_quickstart_writes_a_report_with_unbiased_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quickstart.OBJECTIVES[0] == "auto"
    assert quickstart.OBJECTIVES[2:] == ("ips", "dr")
    monkeypatch.setattr(quickstart, "OBJECTIVES", ("ips", "dr"))
    out = tmp_path / "quickstart"
    result = CliRunner().invoke(app, ["quickstart", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    real, synthetic = content["logs"]
    assert real["n"] == 4000 and real["log"]["items"] == 34
    assert set(real["objectives"].values()) == {"ips", "dr"}
    # About a hundred clicks are too few for a verdict.
    for policy in real["policies"].values():
        assert policy["verdict"]["decision"] == "not enough evidence"
    for name, policy in synthetic["policies"].items():
        truth = synthetic["truth"][name]["true_value"]
        assert policy["verdict"]["decision"] == "go"
        assert truth > synthetic["logging"]["value"]
        # IPS and DR are unbiased: within four standard errors of the truth.
        for estimator in ("ips", "dr"):
            found = policy["estimates"][estimator]
            assert abs(found["value"] - truth) < 4 * found["std_error"]
    html = (out / "report.html").read_text()
    # Answer, estimates, learning curves, weights and calibration per log, and the
    # values by day of the real one, each in two widths.
    assert html.count("<svg") == 2 * 11
    assert "best possible policy" in html
