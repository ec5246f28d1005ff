"""The report: self-contained, escaped, deterministic, and right at phone and desktop width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from offtower.evaluation import EvaluationRows
from offtower.evaluation.decision.gate import Reason
from offtower.evaluation.evaluate import evaluate_rows
from offtower.evaluation.report import write_report
from offtower.evaluation.report.answer import answer_of
from offtower.evaluation.report.palette import COLORS, MARKERS
from offtower.evaluation.report.plots import DASHES
from offtower.evaluation.report.render import number
from offtower.evaluation.run import HISTOGRAM_EDGES, LogEvaluation
from offtower.evaluation.selection import SelectionLog, compare_selectors, default_candidates

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
        baselines={"best possible policy": 0.9 * scale} if truth else {},
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


def test_same_input_same_bytes_and_its_numbers_beside(tmp_path: Path) -> None:
    one = evaluation()
    assert render(tmp_path / "a.html", one) == render(tmp_path / "b.html", evaluation())
    stored = json.loads((tmp_path / "a.json").read_text())
    found = stored["logs"][0]["policies"]["a"]["estimates"]["ips"]
    assert found["value"] == one.result.policies["a"].estimates["ips"].estimate.value


def test_nothing_known_and_tiny_rewards(tmp_path: Path) -> None:
    html = render(tmp_path / "r.html", evaluation(truth=False, scale=1e-6, names=("only",)))
    assert "True value" not in html
    assert "nan" not in html.lower().replace("pronan", "")


def test_a_policy_has_one_name_everywhere(tmp_path: Path) -> None:
    """The run's name, also where runs share an objective."""
    one = evaluation(names=("first", "second", "third"))
    one.objectives = {"first": "dr-7", "second": "dr-7", "third": "ips-7"}
    html = render(tmp_path / "r.html", one)
    assert "dr-7" not in html and "ips-7" not in html
    for name in one.objectives:
        assert f"<h3>{name}: " in html and f"<tr><td>{name}</td>" in html


def answered(
    difference: float, noise: float, *, n: int = 40_000, weight: float = 1.0, n_policies: int = 1
) -> LogEvaluation:
    """An evaluation by IPS whose difference to the logging policy is known exactly."""
    reward = (np.arange(n) % 5 == 0).astype(float)
    # Mean weight 1, and mean weight * reward .2 + difference; the noise sums to zero.
    weights = np.where(reward > 0.0, 1 + 5 * difference, 1 - 1.25 * difference)
    weights = weights * (1 + noise * np.where(np.arange(n) // 5 % 2 == 0, 1.0, -1.0))
    rows = {
        f"p{i}": EvaluationRows(importance_weight=weights * weight, reward=reward)
        for i in range(n_policies)
    }
    result = evaluate_rows(rows, ["ips"], reward_range=(0.0, 1.0), intervals=("normal",))
    return LogEvaluation(
        title="t",
        result=result,
        log={"path": "a log", "catalogue": "items", "rows": n, "items": 9, "reward": "click"},
        objectives=dict.fromkeys(rows, "dr"),
        histograms={name: [1] * (len(HISTOGRAM_EDGES) - 1) for name in rows},
        curves={name: [] for name in rows},
        runs={name: f"runs/{name}" for name in rows},
    )


def test_a_better_policy_is_answered_with_yes_and_its_figures() -> None:
    answer = answer_of(answered(0.05, 0.3))
    assert answer.headline == "Yes: serve p0" and answer.decision == "go"
    assert "250 per 1,000 requests instead of today's 200: 50 more" in answer.sentence
    low, high = (float(x) for x in re.findall(r"[\d.]+", answer.interval)[1:3])
    assert low < 50.0 < high and answer.figure == "+50"
    assert answer.remedy is None and answer.command == "offtower export runs/p0"


def test_a_worse_policy_is_answered_with_no() -> None:
    answer = answer_of(answered(-0.05, 0.3))
    assert answer.headline == "No: keep what is served today"
    assert "150 per 1,000 requests instead of today's 200: 50 less" in answer.sentence
    assert "less than today" in answer.interval and answer.figure == "−50"


def test_an_undecided_log_says_how_many_rows_would_decide() -> None:
    one = answered(0.002, 0.9)
    gap = one.result.policies["p0"].estimates["ips"].difference
    assert gap is not None
    answer = answer_of(one)
    assert answer.headline == "Not yet: this log cannot decide"
    half = (gap.simultaneous.high - gap.simultaneous.low) / 2
    needed = 40_000 * (half / abs(gap.estimate.value)) ** 2
    found = re.search(r"About ([\d,]+) rows", answer.remedy or "")
    assert found is not None
    assert needed <= int(found[1].replace(",", "")) <= 1.11 * needed
    assert answer.command == (
        "offtower search runs/p0 --contexts CONTEXTS --sample --log served.parquet"
    )


def test_a_policy_that_is_served_today_earns_as_much() -> None:
    answer = answer_of(answered(0.0, 0.0))
    assert "may earn as much as that" in answer.sentence
    assert answer.interval == "95 % confidence: as much as today"


def test_wrong_propensities_are_named_before_anything_else() -> None:
    answer = answer_of(answered(0.0, 0.1, weight=3.0))
    assert answer.decision == "not enough evidence"
    assert "probabilities look wrong" in answer.sentence
    assert answer.command == "offtower validate 'a log' --catalogue items"


def test_rows_of_too_little_overlap_ask_for_exploration() -> None:
    n = 4000
    weights = np.zeros(n)
    weights[:40] = 100.0
    rows = {"p": EvaluationRows(importance_weight=weights, reward=(np.arange(n) % 2) * 1.0)}
    one = answered(0.0, 0.1)
    one.result = evaluate_rows(rows, ["ips"], reward_range=(0.0, 1.0), intervals=("normal",))
    answer = answer_of(one)
    assert "hardly any results" in answer.sentence and "exploration" in (answer.remedy or "")


def test_a_simpler_policy_that_would_earn_more_is_named() -> None:
    one = answered(0.05, 0.3)
    better = answered(0.07, 0.3).result.policies["p0"].estimates["ips"]
    worse = answered(0.01, 0.3).result.policies["p0"].estimates["ips"]
    one.baseline_values = {"uniform": worse}
    assert answer_of(one).simpler is None
    assert answer_of(one).baselines == (("uniform", "210", "+10"),)
    one.baseline_values = {"uniform": worse, "most rewarded items": better}
    assert "'most rewarded items' for everybody would earn 270" in (answer_of(one).simpler or "")


@pytest.mark.usefixtures("no_charts")
def test_the_first_screen_has_no_statistics(tmp_path: Path) -> None:
    """A product manager reads it: none of these words stand above the folded details."""
    html = render(tmp_path / "r.html", answered(0.002, 0.9, n_policies=2))
    first = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", html.split("<details>")[0], flags=re.S)
    words = r"estimator|importance|propensit|pareto|variance|off-policy|\bips\b|V\(new\)|gate"
    assert not re.search(words, first, flags=re.I)
    assert "Not yet" in first and "per 1,000 requests" in first


def test_values_by_week_have_a_chart_a_table_and_a_sentence(tmp_path: Path) -> None:
    n = 6000
    rng, at = np.random.default_rng(3), np.arange(n)
    shown = rng.random(n) < 0.5
    reward = (rng.random(n) < 0.3 + np.where(shown, 0.3 - 0.4 * at / n, 0.0)).astype(float)
    time = 1_767_571_200_000_000 + at * (6 * 7 * 86_400_000_000 // n)
    weights = {"<new>": np.where(shown, 1.8, 0.2), "other": np.ones(n)}
    rows = {name: EvaluationRows(one, reward, time=time) for name, one in weights.items()}
    one = replace(
        answered(0.002, 0.9),
        result=evaluate_rows(rows, ["ips"], reward_range=(0.0, 1.0)),
        histograms={name: [1] * (len(HISTOGRAM_EDGES) - 1) for name in rows},
        curves={},
        runs={},
    )
    html = render(tmp_path / "r.html", one)
    parser = Balanced()
    parser.feed(html)
    assert not parser.open and "<new>" not in html
    assert "<summary>Values by week</summary>" in html and "<td>week 6</td>" in html
    assert "<td>2026-01-05 00:00</td>" in html and "the next week" in html
    said = " ".join(answer_of(one).over_time)
    assert re.search(
        r"The value of <new> fell from \d+\.?\d* in week 1 to \d+\.?\d* in week 6", said
    )
    assert answer_of(one).decision == "not enough evidence"
    assert "changed over the time of the log" in answer_of(one).sentence
    assert "newer log" in (answer_of(one).remedy or "")
    no_times = answer_of(answered(0.002, 0.9)).over_time
    assert no_times[0].startswith("The log has no timestamps")


def test_names_are_no_formulas(tmp_path: Path) -> None:
    """Matplotlib would read the text between dollars as TeX, and fail on what is none."""
    name = r"_a$\bad{$b<i>"
    text = render(tmp_path / "report.html", evaluation(names=(name, "other")))
    assert text.count(r"_a$\bad{$b&lt;i&gt;") > 4 and "b<i>" not in text


def test_numbers() -> None:
    assert number(None) == "–"
    assert number(float("nan")) == "–"
    assert number(-0.00125, 6) == "−0.001250"
    assert number(1234567.0) == "1.23e+06"


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: the page cannot be looked at"
)


def chromium(tmp_path: Path, page: Path, *arguments: str) -> str:
    """What headless chromium prints for a page."""
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=4000",
            *arguments,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def framed(tmp_path: Path, html: str, width: int, height: int) -> Path:
    """A page that shows the report in a frame, since a window has a least width of its own."""
    source = json.dumps(html).replace("</", "<\\/")
    page = tmp_path / "frame.html"
    page.write_text(
        f"<body style='margin:0'><iframe id=f style='width:{width}px;height:{height}px;border:0'>"
        "</iframe>"
        "<pre id=out></pre><script>const f=document.getElementById('f');"
        "f.onload=()=>{const d=f.contentDocument.documentElement;"
        "document.getElementById('out').textContent=`width ${d.scrollWidth} of ${d.clientWidth}`};"
        f"f.srcdoc={source};</script>"
    )
    return page


def selected() -> LogEvaluation:
    """A report with everything in it: several policies with long names, and a selection."""
    long = "a-policy-with-a-very-long-name-" * 4
    one = evaluation(names=("short", long))
    rng = np.random.default_rng(1)
    rows = EvaluationRows(
        rng.lognormal(-0.1, 0.4, 500),
        (rng.random(500) < 0.3) * 1.0,
        np.full(500, 0.3),
        rng.uniform(0.2, 0.4, 500),
    )
    log = SelectionLog.from_rows({"trees": rows})
    one.selection = {"short": compare_selectors(log, default_candidates(log.problem))}
    return one


@pytest.mark.usefixtures("no_charts")
def test_a_selection_shows_its_ranking_and_its_disagreements(tmp_path: Path) -> None:
    one = selected()
    html = render(tmp_path / "report.html", one)
    found = one.selection["short"]
    assert "Ranking by paired" in html and "heuristic could not run" in html
    for score in found.results["paired"].ranking[:8]:
        assert f"<td>{score.name}</td>" in html
    for method in found.disagreements:
        assert f"<li><b>{method}</b> chooses" in html
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["logs"][0]["selection"]["short"]["disagreements"] == found.disagreements


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_page_never_scrolls_sideways(tmp_path: Path, width: int) -> None:
    """The page, laid out in a frame of that width, is no wider; only boxes inside it may scroll."""
    html = render(tmp_path / "report.html", selected()).replace("<details", "<details open")
    page = framed(tmp_path, html, width, 900)
    printed = chromium(tmp_path, page, "--dump-dom")
    found = re.search(r"width (\d+) of (\d+)", printed)
    assert found is not None
    # The frame's own scroll bar may take up to 15 pixels of the width.
    assert width - 15 <= int(found[2]) <= width
    assert int(found[1]) <= int(found[2])


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_screenshot_has_ink_in_every_part_and_a_margin(tmp_path: Path, width: int) -> None:
    """Phone and desktop: charts are drawn (their colors are there), nothing touches the edges."""
    html = render(tmp_path / "report.html", selected()).replace("<details", "<details open")
    page = framed(tmp_path, html, width, 3000)
    shot = tmp_path / "shot.png"
    chromium(tmp_path, page, f"--screenshot={shot}", f"--window-size={max(width, 800)},3000")
    image = plt.imread(shot)[:3000, :width, :3]
    assert image.shape[0] == 3000
    dark = image.mean(axis=2) < 0.6
    for part in np.array_split(dark, 6):
        assert part.mean() > 0.002
    assert not dark[:, :8].any() and not dark[200:, -8:].any()
    blue = np.abs(image - np.array([0.0, 0x72 / 255, 0xB2 / 255])).max(axis=2) < 0.02
    assert blue.sum() > 200


@needs_chromium
def test_prints_on_paper(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    render(report, selected())
    chromium(tmp_path, report, f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_series_differ_in_more_than_color() -> None:
    """Neighboring colors also differ in lightness on a gray printer, or in marker and dash."""
    assert len(set(MARKERS)) == len(set(map(str, DASHES))) == len(set(COLORS)) == 6


def test_few_rows_are_named_beside_propensities_that_look_wrong() -> None:
    """Weights of a heavy tail are off their mean where the propensities are right."""
    one = answered(0.0, 0.1, weight=3.0)
    policy = one.result.policies["p0"]
    tail = Reason("weight_tail", "the weights have a heavy tail", "doubt")
    verdict = replace(policy.verdict, reasons=(*policy.verdict.reasons, tail))
    one.result.policies["p0"] = replace(policy, verdict=verdict)
    answer = answer_of(one)
    assert "too few rows" in answer.sentence and "probabilities are wrong" in answer.sentence
    assert "If they are right" in (answer.remedy or "")
