"""Error of verdicts over all looks at a log, and logs that are not held out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import norm
from typer.testing import CliRunner

from offtower import TwoTowerPolicyLearner
from offtower.cli import app
from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.ledger import FOLDER, Ledger, LogLedger
from offtower.data.location import Location
from offtower.data.log import ParquetLog
from offtower.data.manifest import write_manifest
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.evaluation import EvaluationRows, GateOptions, evaluate_rows
from offtower.evaluation.decision.gate import GO, NO_GO, NOT_ENOUGH, Reason, Verdict, withhold
from offtower.evaluation.looks import LookRequest, Looks, plan_look, share, shares_left
from offtower.evaluation.report import write_report
from offtower.evaluation.run import LogEvaluation, evaluate_runs
from offtower.training.run import train_run
from tests.mappers import BACKWARDS

LOOKS = 20
PARTS = ("context", "action", "reward", "pscore")


def request(policies: dict[str, str], fresh: str | None = None, **withheld: str) -> LookRequest:
    return LookRequest("log", policies, 0.95, withheld, fresh)


def test_shares_sum_to_what_is_spent() -> None:
    assert share(1) == 0.5
    for look in range(1, 200):
        spent = sum(share(number) for number in range(1, look + 1))
        assert spent == pytest.approx(1.0 - shares_left(look), abs=1e-12)


def test_first_look_keeps_its_confidence_and_later_ones_share_the_rest() -> None:
    ledger = Ledger()
    first = plan_look(ledger, request({"a": "a", "b": "b"}))
    assert first.confidences == {"a": 1.0 - (1.0 - 0.95) / 2, "b": 1.0 - (1.0 - 0.95) / 2}
    assert (first.looks.look, first.looks.policies, first.looks.repeated) == (1, 2, False)
    assert first.looks.spent == pytest.approx(0.025) and first.looks.error == pytest.approx(0.0125)
    # b again, beside c: b's verdict stands, and c has the whole share of the second look.
    second = plan_look(ledger, request({"c": "c", "b": "b"}))
    assert second.confidences["b"] == first.confidences["b"]
    assert 1.0 - second.confidences["c"] == pytest.approx(2 * 0.05 * 0.25)
    assert second.looks.left == pytest.approx(0.05 / 4)
    for _ in range(2):
        again = plan_look(ledger, request({"renamed": "c"}))
        assert again.looks.repeated and again.looks.look == 2 and again.number is None
        assert list(again.confidences.values()) == [second.confidences["c"]]
    assert len(ledger.entries("log")) == 2 and ledger.entries("other") == ()


def test_a_declared_question_has_an_error_of_its_own() -> None:
    ledger = Ledger()
    for policy in "ab":
        plan_look(ledger, request({policy: policy}))
    declared = plan_look(ledger, request({"a": "a"}, fresh="another launch"))
    assert declared.looks.look == 1 and declared.confidences["a"] == pytest.approx(0.95)
    assert declared.looks.question.uncounted == 2
    assert "'another launch'; 2 earlier looks" in declared.looks.sentence
    # The same reason continues the question; so does no reason.
    assert plan_look(ledger, request({"c": "c"}, fresh="another launch")).looks.look == 2
    assert plan_look(ledger, request({"d": "d"})).looks.look == 3
    assert plan_look(ledger, request({"e": "e"}, fresh="a third")).looks.question.uncounted == 5


def test_withheld_policies_spend_nothing_and_get_no_go() -> None:
    ledger = Ledger()
    plan = plan_look(ledger, request({"a": "a"}, a="it was trained on this log"))
    assert plan.looks.look == 0 and plan.looks.spent == 0.0 and plan.confidences["a"] == 0.95
    assert plan_look(ledger, request({"b": "b"})).looks.look == 1
    evidence = Reason("interval", "above", "evidence")
    for decision, expected in ((GO, NOT_ENOUGH), (NOT_ENOUGH, NOT_ENOUGH), (NO_GO, NO_GO)):
        found = withhold(Verdict(decision, (evidence,)), "trained on it")
        assert found.decision == expected
        assert any(one.code == "not_held_out" for one in found.reasons)
        assert (found.reasons[0].kind == "doubt") == (expected == NOT_ENOUGH)
    assert withhold(Verdict(GO, (evidence,)), "x").exit_code == 3


def test_a_ledger_that_cannot_be_written_counts_what_is_known() -> None:
    class ReadOnly(Ledger):
        read_only = False

        def append(self, *args: Any) -> Any:
            if self.read_only:
                raise PermissionError("read-only file system")
            return super().append(*args)

    ledger = ReadOnly()
    plan_look(ledger, request({"a": "a"}))
    ledger.read_only = True
    for fresh, look in ((None, 2), ("why", 1)):
        plan = plan_look(ledger, request({"b": "b"}, fresh))
        assert plan.looks.look == look and plan.number is None
        assert "could not be recorded" in plan.looks.notes[0]
        assert "read-only file system" in plan.looks.notes[0]


def test_false_go_over_twenty_looks_is_at_most_alpha() -> None:
    # Independent null policies, one at a time: without a ledger some go in 1 - .975^20 = .40 of the
    # worlds. A rate of .05 exceeds 288 of 5,000 with probability 1e-4 (312 with 1e-5).
    worlds, go, uncounted = 5000, 0, 0
    ledger = Ledger()
    levels = [
        plan_look(ledger, request({str(k): str(k)})).confidences[str(k)] for k in range(LOOKS)
    ]
    critical = norm.ppf([0.5 + 0.5 * level for level in levels])
    z = np.random.default_rng(0).normal(size=(worlds, LOOKS))
    go = int((z > critical).any(axis=1).sum())
    uncounted = int((z > norm.ppf(0.975)).any(axis=1).sum())
    assert go <= 312 and uncounted > 1500


@pytest.mark.slow
def test_false_go_of_rows_with_a_ledger() -> None:
    # 400 worlds of 20 null policies on the same rewards. A rate of .05 exceeds 37 with probability
    # 1e-4; without a ledger some policy goes in about .3 of the worlds.
    go = 0
    for seed in range(400):
        world, ledger = np.random.default_rng(seed), Ledger()
        reward = (world.random(400) < 0.5).astype(np.float64)
        found = [
            evaluate_rows(
                {"new": EvaluationRows(world.gamma(4.0, 0.25, 400), reward)},
                ("snips",),
                reward_range=(0, 1),
                intervals=("normal",),
                ledger=ledger,
            )
            for _ in range(LOOKS)
        ]
        go += any(one.exit_code == 0 for one in found)
    assert go <= 37


def test_rows_with_a_ledger_repeat_and_count(capsys: pytest.CaptureFixture[str]) -> None:
    world, ledger = np.random.default_rng(3), Ledger()
    reward = (world.random(500) < 0.3).astype(np.float64)
    new, other = (EvaluationRows(world.gamma(4.0, 0.25, 500), reward) for _ in range(2))

    def evaluate(rows: EvaluationRows, **options: Any) -> tuple[Looks | None, dict[str, Any]]:
        found = evaluate_rows({"new": rows}, reward_range=(0, 1), intervals=("normal",), **options)
        content = found.to_dict()
        content.pop("looks", None)
        return found.looks, content

    plain = evaluate(new)
    assert plain[0] is None
    first, again = (evaluate(new, ledger=ledger) for _ in range(2))
    # The first look has the numbers of an evaluation without a ledger, and so has its repetition.
    assert first[1] == plain[1] == again[1]
    assert first[0] is not None and again[0] is not None
    assert not first[0].repeated and again[0].repeated
    second, _ = evaluate(other, ledger=ledger)
    changed, _ = evaluate(new, ledger=ledger, confidence=0.9)
    assert second is not None and second.look == 2
    assert changed is not None and changed.look == 3 and changed.alpha == pytest.approx(0.1)


def test_a_learner_gets_no_go_on_the_rows_of_its_fit(tmp_path: Path) -> None:
    world = np.random.default_rng(0)

    def feedback(rows: int) -> dict[str, Any]:
        return {
            "n_rounds": rows,
            "n_actions": 4,
            "context": world.normal(size=(rows, 3)),
            "action": world.integers(0, 4, rows),
            "reward": (world.random(rows) < 0.5).astype(np.float64),
            "pscore": np.full(rows, 0.25),
            "action_context": np.eye(4),
            "position": None,
        }

    train, validation, test = (feedback(400) for _ in range(3))
    fitted = TwoTowerPolicyLearner(3, 4, objective="ips", epochs=2).fit(train, validation)
    fitted.save(tmp_path / "learner")
    for learner in (fitted, TwoTowerPolicyLearner.load(tmp_path / "learner")):
        order = world.permutation(400)[:300]
        part = {"n_rounds": 300, **{k: train[k][order] for k in PARTS}}
        codes = [
            learner.evaluate(rows, gate=GateOptions(margin=-0.9)).exit_code
            for rows in (train, validation, {**train, **part}, test)
        ]
        assert codes == [3, 3, 3, 0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its logs and another log."""
    folder = tmp_path_factory.mktemp("looks")
    world = SimulatedWorld(8, WorldSettings(4, 4, 4, intercept=0.0), seed=1)
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    for seed, name in enumerate(("train", "validation", "test")):
        write_log(folder / name, world.log(500, seed=seed), world.log_schema)
    parts = ("train", "validation", "test", "catalogue")
    config = {
        "name": "a",
        "runs": str(folder / "runs"),
        "data": {key: str(folder / key) for key in parts},
        "policy": {"embedding_dim": 4},
        "objective": {"name": "ips"},
        "training": {"epochs": 2, "batch_size": 64, "threads": 1},
    }
    train_run(parse_config(config))
    return folder


def look(place: Path, log: Path, **options: Any) -> LogEvaluation:
    """An evaluation whose margin any policy exceeds."""
    changes = ["evaluation.gate.margin=-0.9", *options.pop("overrides", ())]
    return evaluate_runs([place / "runs" / "a"], log=log, overrides=changes, **options)


def reasons(found: LogEvaluation) -> str:
    return " ".join(one.message for one in found.result.policies["a"].verdict.reasons)


def test_no_go_on_the_logs_that_a_run_was_made_with(place: Path, tmp_path: Path) -> None:
    for part, said in (("train", "trained on"), ("validation", "epoch was chosen on")):
        # Under another path and name, and without manifest or ledger, it is the same log.
        (tmp_path / part).mkdir()
        shutil.copy(place / part / "part-00000.parquet", tmp_path / part / "rows.parquet")
        found = look(place, place / part)
        assert found.exit_code == 3 and said in reasons(found)
        assert str(place / "test") in reasons(found)
    (tmp_path / "all").mkdir()
    for part in ("train", "test"):
        shutil.copy(place / part / "part-00000.parquet", tmp_path / "all" / f"{part}.parquet")
    schema = json.loads((place / "test" / "_offtower.json").read_text())["schema"]
    run = tmp_path / "runs" / "a"
    shutil.copytree(place / "runs" / "a", run)
    text = "\n".join(
        line for line in (run / "config.yaml").read_text().splitlines() if line[:1] != "#"
    )
    (run / "config.yaml").write_text(
        text.replace("log_schema: null", f"log_schema: {json.dumps(schema)}")
    )
    for folder, said in (
        ("train", "this log"),
        ("validation", "this log"),
        ("all", "1 of 2 files"),
    ):
        found = look(tmp_path, tmp_path / folder)
        assert found.exit_code == 3 and said in reasons(found), folder
    page = write_report(tmp_path / "report.html", [found], title="t", command="c").read_text()
    assert "this log had a part in learning or choosing it" in page


def test_looks_at_a_held_out_log_are_counted_shown_and_listed(place: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    shutil.copytree(place / "test", log, ignore=shutil.ignore_patterns(FOLDER))
    first = look(place, log)
    assert first.exit_code == 0 and first.result.looks is not None
    assert first.result.looks.look == 1 and first.result.simultaneous_confidence == 0.95
    again = look(place, log, overrides=["evaluation.batch_rows=100"])
    assert again.result.looks is not None and again.result.looks.repeated
    assert again.result.policies["a"].verdict == first.result.policies["a"].verdict
    more = look(place, log, also=["greedy", "temperature=2"])
    assert more.result.looks is not None and more.result.looks.policies == 3
    gaps = {name: one.estimates["snips"].difference for name, one in more.result.policies.items()}
    levels = {name: gap.simultaneous.confidence for name, gap in gaps.items() if gap is not None}
    assert levels["a"] == 0.95
    assert 1.0 - levels["a greedy"] == pytest.approx(2 * 0.05 * 0.25 / 2)
    # A copy of the log goes on counting, and a declared question begins again.
    shutil.copytree(log, tmp_path / "copy")
    third = look(place, tmp_path / "copy", overrides=["evaluation.confidence=0.9"])
    assert third.result.looks is not None and third.result.looks.look == 3
    runner, run = CliRunner(), str(place / "runs" / "a")
    arguments = [run, "--log", str(log), "--set", "evaluation.gate.margin=-0.9"]
    report = ["--report", str(tmp_path / "report.html")]
    done = runner.invoke(app, ["evaluate", *arguments, *report, "--fresh", "a launch in May"])
    assert done.exit_code == 0, done.output
    assert "look 1 at this log" in done.output and "'a launch in May'" in done.output
    page = (tmp_path / "report.html").read_text()
    assert "Look 1 at this log" in page and "a launch in May" in page
    assert json.loads((tmp_path / "report.json").read_text())["logs"][0]["looks"]["look"] == 1
    assert runner.invoke(app, ["evaluate", *arguments, "--fresh", " "]).exit_code == 2
    listed = runner.invoke(app, ["log", "history", str(log)])
    assert listed.exit_code == 0, listed.output
    lines = [line[21:] for line in listed.output.splitlines() if line]
    assert len(lines) == 4 and lines[0].startswith("look 1, error 0.025: a: go")
    assert "look 2" in lines[1] and "a new question was declared: a launch in May" in lines[2]
    content = json.loads(runner.invoke(app, ["log", "history", str(log), "--json"]).stdout)
    kinds = [entry["kind"] for entry in content["entries"]]
    assert kinds == ["evaluated", "verdict"] * 2 + ["question", "evaluated", "verdict"]
    trained = runner.invoke(app, ["log", "history", str(place / "train")]).output
    assert "was trained on it" in trained


def test_the_log_that_serving_was_tuned_on_gives_no_go(place: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "runs" / "a", tmp_path / "log"
    shutil.copytree(place / "runs" / "a", run)
    shutil.copytree(place / "test", log, ignore=shutil.ignore_patterns(FOLDER))
    shutil.copytree(log, tmp_path / "same")
    grid = ["--temperature", "1", "--temperature", "2", "--uniform", "0"]
    arguments = ["tune", "serving", str(run), "--log", str(log), *grid, "--keep-ess", "10"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    entries = LogLedger(log).entries(
        json.loads(CliRunner().invoke(app, ["log", "history", str(log), "--json"]).stdout)[
            "content"
        ]
    )
    assert [entry.kind for entry in entries] == ["evaluated", "verdict", "served"]
    # The ledger says so, and where a copy has none, the run's manifest does.
    for place_of_log in (log, tmp_path / "same"):
        found = look(tmp_path, place_of_log)
        assert found.exit_code == 3 and "serving was chosen on this log" in reasons(found)


def test_copied_rows_are_not_held_out(place: Path, tmp_path: Path) -> None:
    train, test = (pq.read_table(place / part / "part-00000.parquet") for part in ("train", "test"))
    schema = ParquetLog.open(place / "test").schema
    shuffled = train.take(np.random.default_rng(0).permutation(train.num_rows))
    write_log(tmp_path / "copy", [shuffled], schema)
    write_log(tmp_path / "mixed", [test, train.slice(7, 100)], schema, rows_per_group=50)
    assert "it was trained on its rows, in other files" in reasons(look(place, tmp_path / "copy"))
    chosen = pq.read_table(place / "validation" / "part-00000.parquet")
    write_log(tmp_path / "chosen", [chosen.slice(200), chosen.slice(0, 200)], schema)
    found = reasons(look(place, tmp_path / "chosen"))
    assert "its epoch was chosen on its rows, in other files" in found
    mixed = look(place, tmp_path / "mixed")
    assert mixed.exit_code == 3 and "it was trained on 0.17 +-" in reasons(mixed)
    assert str(place / "test") in reasons(mixed) and "timestamp" in reasons(mixed)
    assert reasons(look(place, tmp_path / "mixed", execution=BACKWARDS)) == reasons(mixed)
    write_log(tmp_path / "other", [test], schema)
    assert look(place, tmp_path / "other").exit_code == 0


def test_looks_before_files_were_added_count(place: Path, tmp_path: Path) -> None:
    world = SimulatedWorld(8, WorldSettings(4, 4, 4, intercept=0.0), seed=1)
    log, later = tmp_path / "log", [tmp_path / str(number) for number in range(3)]
    for seed, folder in enumerate((log, *later)):
        write_log(folder, world.log(500, seed=20 + seed), world.log_schema)

    def looks() -> Looks:
        found = look(place, log).result.looks
        assert found is not None
        return found

    def add(*folders: Path) -> None:
        for folder in folders:
            shutil.copy(folder / "part-00000.parquet", log / f"later-{folder.name}.parquet")

    assert (looks().look, looks().before_change) == (1, 0)
    add(later[0])
    grown = looks()
    assert (grown.look, grown.before_change, grown.repeated) == (2, 1, False)
    assert "1 of the earlier looks were at this log before files were added" in grown.sentence
    assert looks().repeated and looks().look == 2
    # A log of which less than half was seen has an error of its own.
    (log / "part-00000.parquet").unlink()
    (log / "_offtower.json").unlink()
    write_manifest(Location.of(log), ParquetLog.open(later[0]).schema.to_dict(), 0, "")
    add(*later[1:])
    assert (looks().look, looks().before_change) == (1, 0)
