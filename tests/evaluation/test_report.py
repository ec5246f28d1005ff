"""The report: self-contained, escaped, deterministic, and right at phone and desktop width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from offtower.evaluation import EvaluationRows
from offtower.evaluation.evaluate import evaluate_rows
from offtower.evaluation.report import write_report
from offtower.evaluation.report.render import number
from offtower.evaluation.run import HISTOGRAM_EDGES, LogEvaluation

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order or never."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()


def evaluation(
    *, names: tuple[str, ...] = ("a", "b"), scale: float = 1.0, truth: bool = True
) -> LogEvaluation:
    rng = np.random.default_rng(0)
    n = 400
    reward = (rng.random(n) < 0.3).astype(float) * scale
    rows = {
        name: EvaluationRows(
            importance_weight=rng.lognormal(0, 0.3 + i, n) / np.exp((0.3 + i) ** 2 / 2),
            reward=reward,
            action_reward=np.full(n, 0.3 * scale),
            expected_reward=np.full(n, 0.31 * scale),
        )
        for i, name in enumerate(names)
    }
    curve = [
        {
            "epoch": e,
            "validation": {"value": 0.3 + e / 100, "low": 0.2, "high": 0.4},
            "true_value": 0.3,
        }
        for e in range(4)
    ]
    return LogEvaluation(
        title="A log <b>& more</b>",
        result=evaluate_rows(rows, reward_range=(0.0, scale)),
        log={"path": "x", "rows": n, "items": 12_345, "fingerprint": "f"},
        objectives={name: name for name in names},
        histograms={name: [1] * (len(HISTOGRAM_EDGES) - 1) for name in names},
        curves={name: curve if i == 0 else [] for i, name in enumerate(names)},
        truth={name: {"true_value": 0.3 * scale} for name in names} if truth else {},
        landmarks={"best possible policy": 0.9 * scale} if truth else {},
        notes=["a note with <script>alert(1)</script>"],
    )


def render(path: Path, *evaluations: LogEvaluation) -> str:
    write_report(path, evaluations, title="Title <i>", command="offtower evaluate x")
    return path.read_text(encoding="utf-8")


def test_one_file_balanced_and_escaped(tmp_path: Path) -> None:
    html = render(tmp_path / "report.html", evaluation(names=("a", "<b>evil</b>")))
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert not {"script", "i", "link", "img"} & parser.seen
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;evil&lt;/b&gt;" in html
    assert not re.search(r"(src|href)=\"?https?:", html)
    assert "12,345 items" in html


def test_same_input_same_bytes(tmp_path: Path) -> None:
    assert render(tmp_path / "a.html", evaluation()) == render(tmp_path / "b.html", evaluation())


def test_json_beside_holds_the_numbers(tmp_path: Path) -> None:
    one = evaluation()
    render(tmp_path / "report.html", one)
    stored = json.loads((tmp_path / "report.json").read_text())
    found = stored["logs"][0]["policies"]["a"]["estimates"]["ips"]
    assert found["value"] == one.result.policies["a"].estimates["ips"].estimate.value


def test_nothing_known_and_tiny_rewards(tmp_path: Path) -> None:
    html = render(tmp_path / "r.html", evaluation(truth=False, scale=1e-6, names=("only",)))
    assert "True value" not in html
    assert "nan" not in html.lower().replace("pronan", "")


def test_numbers() -> None:
    assert number(None) == "–"
    assert number(float("nan")) == "–"
    assert number(-0.00125, 6) == "−0.001250"
    assert number(1234567.0) == "1.23e+06"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_never_scrolls_sideways(tmp_path: Path, width: int) -> None:
    """The page, laid out in a frame of that width, is no wider; only boxes inside it may scroll."""
    long = "a-policy-with-a-very-long-name-" * 4
    html = render(tmp_path / "report.html", evaluation(names=("short", long)))
    source = json.dumps(html).replace("</", "<\\/")
    frame = (
        f"<body style='margin:0'><iframe id=f style='width:{width}px;height:900px;border:0'>"
        "</iframe>"
        "<pre id=out></pre><script>const f=document.getElementById('f');"
        "f.onload=()=>{const d=f.contentDocument.documentElement;"
        "document.getElementById('out').textContent=`width ${d.scrollWidth} of ${d.clientWidth}`};"
        f"f.srcdoc={source};</script>"
    )
    page = tmp_path / "frame.html"
    page.write_text(frame)
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=4000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    found = re.search(r"width (\d+) of (\d+)", done.stdout)
    assert found is not None, done.stderr[-500:]
    # The frame's own scroll bar may take up to 15 pixels of the width.
    assert width - 15 <= int(found[2]) <= width
    assert int(found[1]) <= int(found[2])
