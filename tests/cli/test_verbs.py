"""The command line: every verb, its exit codes, its JSON and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from offtower.cli import app
from offtower.config import load_config

RUNNER = CliRunner()
REPOSITORY = Path(__file__).parents[2]


def call(*arguments: str) -> Any:
    return RUNNER.invoke(app, list(arguments))


def call_json(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == code, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


VERBS = (
    "doctor",
    "simulate",
    "join",
    "ingest",
    "validate",
    "train",
    "evaluate",
    "export",
    "search",
    "benchmark",
    "quickstart",
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_helps_with_an_example(verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert f"offtower {verb}" in result.stdout
    assert "Example:" in result.stdout
    assert "--json" in result.stdout


def test_the_first_of_two_words_names_the_second() -> None:
    for given in (["experiment"], ["experiment", "--help"], ["experiment", "write"]):
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 2
        assert "'experiment plan' or 'experiment read'" in result.output


def test_doctor_lists_backends_and_packages() -> None:
    content = call_json("doctor")
    assert "reference" in content["available_backends"]
    assert {"ips", "dr", "regression"} <= set(content["objectives"])
    assert content["packages"]["torch"]
    assert call("doctor").exit_code == 0


@pytest.fixture(scope="module")
def own_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV log as the README shows it."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    n = 900
    item = rng.integers(0, 6, n)
    age = rng.integers(18, 80, n)
    country = np.array(["de", "fr", "jp"])[rng.integers(0, 3, n)]
    click = (rng.random(n) < np.where(item == 2, 0.7, 0.2)).astype(int)
    lines = ["age,country,item,click,propensity,time"]
    lines += [
        f"{age[i]},{country[i]},item-{item[i]},{click[i]},{1 / 6},{1_700_000_000 + i}"
        for i in range(n)
    ]
    (folder / "clicks.csv").write_text("\n".join(lines))
    schema = {
        "log": {
            "context": [
                {"name": "age", "kind": "numeric"},
                {"name": "country", "kind": "category"},
            ],
            "action": "item",
            "reward": "click",
            "pscore": "propensity",
            "timestamp": "time",
        }
    }
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    return folder


@pytest.fixture(scope="module")
def trained(own_log: Path) -> Path:
    """The README's three commands."""
    out = own_log / "logs"
    schema = str(own_log / "schema.yaml")
    content = call_json(
        *("ingest", str(own_log / "clicks.csv"), "--schema", schema),
        *("--out", str(out), "--split", "time"),
    )
    assert content["rows"] == 900
    assert content["items"] == 6
    assert content["splits"] == {"train": 540, "validation": 180, "test": 180}
    config = {
        "name": "own-log",
        "runs": str(own_log / "runs"),
        "data": {
            **{part: str(out / part) for part in ("train", "validation", "test", "catalogue")}
        },
        "objective": {"name": "ips"},
        "training": {"epochs": 8, "batch_size": 64, "learning_rate": 0.01, "threads": 1},
    }
    path = own_log / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    content = call_json("train", str(path))
    assert content["epochs"] == 8
    return own_log


def test_validate_finds_no_error(trained: Path) -> None:
    logs = trained / "logs"
    arguments = ("validate", str(logs / "log"), "--catalogue", str(logs / "catalogue"))
    content = call_json(*arguments)
    assert content["ok"]
    inverse = next(f for f in content["findings"] if "1/pscore" in f["message"])
    assert inverse["numbers"]["mean"] == pytest.approx(6.0)
    assert call(*arguments).exit_code == 0


def test_evaluate_gives_the_verdict_as_exit_code_and_a_report(trained: Path) -> None:
    """One item earns .7, the others .2: 180 rows suffice for a go."""
    run = trained / "runs" / "own-log"
    content = call_json("evaluate", str(run), code=0)
    assert content["policies"]["own-log"]["verdict"]["decision"] == "go"
    assert content["logging"]["value"] == pytest.approx(0.28, abs=0.12)
    html = (run / "report.html").read_text()
    assert "own-log" in html
    stored = json.loads((run / "report.json").read_text())
    assert stored["logs"][0]["n"] == 180
    shown = call("evaluate", str(run))
    assert shown.exit_code == 0
    assert "go" in shown.output


def test_evaluate_overrides_only_the_evaluation_section(trained: Path) -> None:
    run = str(trained / "runs" / "own-log")
    wide = call_json("evaluate", run, "--set", "evaluation.confidence=0.9")
    narrow = call_json("evaluate", run, "--set", "evaluation.estimators=[snips]")
    assert wide["confidence"] == 0.9
    assert list(narrow["policies"]["own-log"]["estimates"]) == ["snips"]
    refused = call("evaluate", run, "--set", "seed=4")
    assert refused.exit_code == 2
    assert "would change what the run is" in " ".join(refused.output.split())
    # Estimators with a reward model: fitted if evaluation needs one.
    dense = "evaluation.reward_model={kind: dense, folds: 2}"
    with_model = call_json("evaluate", run, "--set", dense, "--fresh", "decided by dr")
    assert {"dm", "dr"} <= set(with_model["policies"]["own-log"]["estimates"])


def test_an_estimator_is_selected_for_the_policy(trained: Path) -> None:
    run = str(trained / "runs" / "own-log")
    content = call_json("evaluate", run, "--select", "all")
    found = content["selection"]["own-log"]
    assert found["recommended"] == "paired"
    assert {"paired", "pasif", "slope"} <= set(found["choices"])
    assert "heuristic" in found["failed"]  # One behavior policy: nothing to play as target.
    html = (trained / "runs" / "own-log" / "report.html").read_text()
    assert "Choice of the estimator" in html
    assert call("evaluate", run, "--select", "oracle").exit_code == 2


def test_evaluate_needs_only_the_policy_of_a_run(trained: Path) -> None:
    """Deleting checkpoints and encodings does no harm: policy/ holds all that evaluation reads."""
    import shutil

    run = trained / "runs" / "copy"
    shutil.copytree(trained / "runs" / "own-log", run)
    for name in ("checkpoints", "encodings"):
        shutil.rmtree(run / name)
    one = call_json("evaluate", str(run), code=0)
    two = call_json("evaluate", str(trained / "runs" / "own-log"), code=0)
    assert (
        one["policies"]["copy"]["estimates"]["ips"]
        == two["policies"]["own-log"]["estimates"]["ips"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "none.yaml"), "no configuration file at 'none.yaml'"),
        (("evaluate", "nowhere"), "is not a run"),
        (("validate", "nowhere", "--catalogue", "nowhere"), "there is no log at 'nowhere'"),
        (("ingest", "nothing.csv", "--out", "o"), "--schema is needed"),
        (("ingest", "open-bandit:cats", "--out", "o"), "campaign must be one of men, women, all"),
        (("simulate", "--out", "/proc/x", "--rows", "5", "--items", "2"), ""),
    ],
)
def test_user_errors_print_one_message_and_exit_with_2(
    arguments: tuple[str, ...], message: str
) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert message in result.output.replace("\n", " ")


def test_bad_rows_are_named_or_quarantined(own_log: Path, tmp_path: Path) -> None:
    text = (own_log / "clicks.csv").read_text().splitlines()
    text[7] = text[7].replace(f"{1 / 6}", "1.5")
    path = tmp_path / "bad.csv"
    path.write_text("\n".join(text))
    arguments = ("ingest", str(path), "--schema", str(own_log / "schema.yaml"))
    refused = call(*arguments, "--out", str(tmp_path / "a"))
    assert refused.exit_code == 2
    assert "row 6" in refused.output
    flat = " ".join(refused.output.split())
    assert "'propensity'" in flat and "1.5" in flat
    assert "expected a probability in (0, 1]" in flat
    assert not (tmp_path / "a" / "log").exists()
    done = call(*arguments, "--out", str(tmp_path / "c"), "--on-bad-rows", "quarantine")
    assert f"next: offtower validate {tmp_path / 'c' / 'log'}" in done.output
    content = call_json(*arguments, "--out", str(tmp_path / "b"), "--on-bad-rows", "quarantine")
    assert content["rows"] == 899
    assert content["quarantined"] == 1
    assert list((tmp_path / "b" / "quarantine").rglob("*.parquet"))


def test_simulate_writes_logs_that_validate(tmp_path: Path) -> None:
    out = tmp_path / "sim"
    content = call_json(
        *("simulate", "--out", str(out), "--items", "20", "--rows", "500", "--features", "all")
    )
    assert content["rows"] == {"train": 500, "validation": 100, "test": 100}
    assert call_json("validate", str(out / "train"), "--catalogue", str(out / "catalogue"))["ok"]
    assert call("simulate", "--out", str(out)).exit_code == 2


def test_simulate_logs_with_several_policies(tmp_path: Path) -> None:
    out = str(tmp_path / "sim")
    content = call_json(
        *("simulate", "--out", out, "--items", "9", "--rows", "50", "--beta", "-1", "--beta", "2")
    )
    assert content["logging_columns"] == {
        "logging-1": "pscore_logging-1",
        "logging-2": "pscore_logging-2",
    }
    assert call_json("validate", f"{out}/train")["ok"]


@pytest.mark.parametrize(
    "path",
    # Those of the quality benchmark are no runs; its own tests read them.
    sorted(p for p in (REPOSITORY / "configs").rglob("*.yaml") if p.parent.name != "quality"),
)
def test_example_configs_are_valid(path: Path) -> None:
    assert load_config(path).name


def test_train_export_search_and_retrain_end_to_end(trained: Path, tmp_path: Path) -> None:
    """Item 2 has reward .7 where others have .2; six items, so every figure can be checked."""
    run = str(trained / "runs" / "own-log")
    assert call("search", run, "--contexts", '{"age": 31, "country": "fr"}').exit_code == 2
    call_json("export", run)
    one = '{"age": 31, "country": "fr"}'
    found = call_json("search", run, "--contexts", one, "-k", "6")["contexts"][0]
    assert found["items"][0] == "item-2"
    assert sorted(found["items"]) == [f"item-{i}" for i in range(6)]
    probability = np.exp(np.array(found["score"]))
    probability /= probability.sum()

    # 2,000 draws of one item: propensities are the softmax's, and so are the frequencies.
    contexts = tmp_path / "contexts.csv"
    contexts.write_text("age,country\n" + "31,fr\n" * 2000)
    served = tmp_path / "served.parquet"
    sample = ("search", run, "--contexts", str(contexts), "-k", "1", "--sample", "--seed", "3")
    drawn = call_json(*sample, "--log", str(served))["contexts"]
    expected = dict(zip(found["items"], probability, strict=True))
    for row in drawn:
        assert row["pscore"][0] == pytest.approx(expected[row["items"][0]], rel=0.01)
    shown = [row["items"][0] for row in drawn]
    for item, p in expected.items():
        # Five standard errors: once in two million.
        assert abs(shown.count(item) - 2000 * p) < 5 * (2000 * p * (1 - p)) ** 0.5 + 1
    assert [row["items"] for row in call_json(*sample)["contexts"]] == [r["items"] for r in drawn]
    assert served.exists() and served.with_suffix(".schema.yaml").exists()

    unseen = call_json("search", run, "--contexts", '{"age": 31, "country": "never seen"}')
    assert unseen["unknown_values"] == {"country": {"rows": 1, "unknown": 1, "missing": 0}}
    assert call_json("search", run, "--contexts", one)["unknown_values"] == {}

    left = call_json("search", run, "--contexts", one, "-k", "5", "--exclude", "item-2")
    assert "item-2" not in left["contexts"][0]["items"]
    for arguments, message in (
        (("--contexts", "[]"), "no rows"),
        (("--contexts", "{broken"), "not valid JSON"),
        (("--contexts", one, "--log", str(tmp_path / "x.parquet")), "needs --sample"),
        (("--contexts", one, "-k", "0"), "k"),
        (("--contexts", one, "-k", "7"), "7"),
        (("--contexts", '{"age": 31}'), "country"),
    ):
        refused = call("search", run, *arguments)
        assert refused.exit_code == 2, arguments
        assert message in " ".join(refused.output.split()), refused.output


def test_benchmark_ops_compares_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("--items", "300", "--steps", "2", "--batch", "16", "--dim", "8")
    results = call_json("benchmark", "ops", *sizes)["results"]
    ways = {line["way"] for line in results}
    assert {"offtower reference", "plain torch", "OBP NNPolicyLearner"} <= ways
    assert all(line["ms"] > 0 for line in results)
    fastest = [line["times"] for line in results if line.get("times") == 1.0]
    assert len(fastest) >= 3
    # Where plain torch does not reach, that is said, and the others still run.
    monkeypatch.setattr("offtower.benchmarks.operators.EAGER_CELLS", 2 * 16 * 300 - 1)
    shown = call("benchmark", "ops", *sizes, "--no-peers")
    assert "plain torch" in shown.output and "not run: arrays of 16 x 300" in shown.output
    assert "offtower reference" in shown.output


def test_benchmark_reports_measured_and_skipped_cases() -> None:
    content = call_json(
        *("benchmark", "train", "--items", "300", "--steps", "2", "--batch", "64", "--no-peers")
    )
    assert {line["trainer"] for line in content["results"]} >= {"offtower exact", "offtower mixed"}
    assert all(line["rows_per_second"] > 0 for line in content["results"])
    refused = call("benchmark", "speed")
    assert refused.exit_code == 2
    assert "ops, eligible, train, memory, quality" in " ".join(refused.output.split())
