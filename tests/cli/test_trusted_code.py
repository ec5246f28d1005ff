"""Runs, policies and exports are data: code that they name is not run unless it is trusted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import offtower
from offtower.checksums import describe_files, write_checked_json, write_checksums
from offtower.cli import app
from offtower.config import RewardModelConfig
from offtower.errors import ConfigError, OfftowerError, RunError, UntrustedCodeError
from offtower.imports import TRUST_CODE, check_code, load_class
from offtower.jobs.connect import _without_working_folder
from offtower.models import load_policy
from offtower.models.reward.dense import fit_estimator, make_estimator
from offtower.retrieval import Retriever
from offtower.retrieval.manifest import read_manifest, write_manifest
from offtower.run_directory import RunDirectory

PACKAGE = Path(offtower.__file__).parents[1]

HOSTILE = """
import os, pathlib
pathlib.Path(os.environ["MARKER"]).touch()
from sklearn.linear_model import Ridge
from torch import nn


class Model(Ridge):
    pass


class Tower(nn.Module):
    def __init__(self, encoding, output_dim):
        super().__init__()
        self.weight = nn.Parameter(__import__("torch").zeros(output_dim))

    def forward(self, features):
        return self.weight.expand(len(next(iter(features.values()))), -1)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with logs and an exported run that has a dense reward model."""
    folder = tmp_path_factory.mktemp("trained")
    runner = CliRunner()
    made = runner.invoke(
        app,
        ["simulate", "--items", "6", "--rows", "200", "--dim", "2", "--out", str(folder / "logs")],
    )
    assert made.exit_code == 0, made.output
    parts = ("train", "validation", "test", "catalogue")
    content = {
        "name": "run",
        "runs": str(folder / "runs"),
        "data": {part: str(folder / "logs" / part) for part in parts},
        "objective": {"name": "ips"},
        "policy": {"embedding_dim": 2},
        "reward_model": {"kind": "dense", "estimator": "sklearn.linear_model:Ridge"},
        "training": {"epochs": 1, "batch_size": 64, "threads": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    for arguments in (["train", str(path)], ["export", str(folder / "runs" / "run")]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "runs" / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that the module `hostile` makes when it is imported; the module can be found."""
    path = tmp_path / "ran"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "hostile.py").write_text(HOSTILE)
    monkeypatch.setenv("MARKER", str(path))
    monkeypatch.delenv(TRUST_CODE, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    yield path
    sys.modules.pop("hostile", None)


def change_config(run: Path, section: str, key: str, value: Any) -> None:
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text())
    place = content
    for part in section.split("."):
        place[part] = place[part] or {"kind": "dense"}
        place = place[part]
    place[key] = value
    path.write_text(yaml.safe_dump(content))


def name_tower(file: Path, path: str) -> None:
    """Let a stored policy, or the context tower of an export, name its code."""
    content = json.loads(file.read_text())
    content["policy"]["context_tower"]["module"] = path
    file.write_text(json.dumps(content))


def name_policys_tower(run: Path, path: str) -> None:
    """Let a run's policy name its code; a stranger makes the checksums fit."""
    name_tower(run / "policy" / "policy.json", path)
    content = json.loads((run / "policy" / "policy.json").read_text())
    write_checked_json(run / "policy" / "policy.json", content)
    write_checksums(run / "policy")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Any, name: str, file: Path, marker: Path) -> None:
    assert result.exit_code == 2, result.output
    text = " ".join(result.output.split())
    assert f"asks for the code '{name}'" in text
    assert file.name in text and "it was not imported" in text
    assert f"--trust-code {name}" in text and TRUST_CODE in text
    assert not marker.exists()


@pytest.mark.parametrize("section", ["reward_model", "evaluation.reward_model"])
def test_evaluate_refuses_a_runs_own_estimator(run: Path, marker: Path, section: str) -> None:
    change_config(run, section, "estimator", "hostile:Model")
    refused(call("evaluate", run), "hostile:Model", run / "config.yaml", marker)
    trusted = call("evaluate", run, "--trust-code", "hostile:Model", "--exit-zero")
    assert trusted.exit_code == 0, trusted.output
    assert marker.exists()
    assert TRUST_CODE not in os.environ


def test_environment_trusts_code(run: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(run, "reward_model", "estimator", "hostile:Model")
    monkeypatch.setenv(TRUST_CODE, "other.module:Thing, hostile:Model")
    result = call("evaluate", run, "--exit-zero")
    assert result.exit_code == 0, result.output
    assert marker.exists()


def test_the_users_own_setting_runs(run: Path, marker: Path) -> None:
    setting = "evaluation.reward_model={kind: dense, estimator: 'hostile:Model'}"
    result = call("evaluate", run, "--set", setting, "--exit-zero")
    assert result.exit_code == 0, result.output
    assert marker.exists()


def test_a_stored_objective_is_never_imported(run: Path, marker: Path) -> None:
    change_config(run, "objective", "name", "hostile:Objective")
    assert call("evaluate", run, "--exit-zero").exit_code == 0
    assert call("export", run).exit_code == 0
    assert not marker.exists()


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_a_policys_own_tower_is_refused(run: Path, marker: Path, verb: str) -> None:
    name_policys_tower(run, "hostile:Tower")
    refused(call(verb, run), "hostile:Tower", run / "policy" / "policy.json", marker)
    with pytest.raises(UntrustedCodeError):
        load_policy(run / "policy")
    assert not marker.exists()
    # Trusted, it is built, and only its weights do not fit.
    with pytest.raises(OfftowerError, match="weights"):
        load_policy(run / "policy", trust_code=["hostile:Tower"])
    assert marker.exists()


def test_an_exports_tower_is_refused(run: Path, marker: Path) -> None:
    current = (run / "export" / "CURRENT").read_text().strip()
    folder = run / "export" / current
    name_tower(folder / "context_tower" / "tower.json", "hostile:Tower")
    manifest = read_manifest(folder)
    manifest["files"] |= describe_files(folder, ["context_tower/tower.json"])
    write_manifest(folder, manifest)
    result = call("search", run, "--contexts", '{"context": [0.0, 1.0]}', "-k", 2)
    refused(result, "hostile:Tower", folder / "context_tower" / "tower.json", marker)
    with pytest.raises(UntrustedCodeError):
        Retriever.open(run)
    assert not marker.exists()
    with pytest.raises(OfftowerError, match="weights"):
        Retriever.open(run, trust_code=["hostile:Tower"])
    assert marker.exists()


@pytest.mark.parametrize("setting", ["training.warm_start", "objective.kl_policy"])
def test_training_refuses_code_of_a_stored_policy(
    trained: Path, run: Path, marker: Path, setting: str
) -> None:
    name_policys_tower(run, "hostile:Tower")
    arguments = ["train", trained / "config.yaml", "--set", f"runs={run.parent / 'new'}"]
    arguments += ["--set", f"{setting}={run / 'policy'}"]
    if setting == "objective.kl_policy":
        arguments += ["--set", "objective.kl=0.1"]
    refused(call(*arguments), "hostile:Tower", run / "policy" / "policy.json", marker)
    result = call(*arguments, "--resume", "--trust-code", "hostile:Tower")
    assert "weights" in result.output
    assert marker.exists()


def test_training_runs_code_that_its_user_names(trained: Path, run: Path, marker: Path) -> None:
    setting = "policy.context_tower={module: 'hostile:Tower'}"
    arguments = ["train", trained / "config.yaml", "--set", f"runs={run.parent / 'new'}"]
    result = call(*arguments, "--set", setting)
    assert result.exit_code == 0, result.output
    assert marker.exists()
    own = run.parent / "new" / "run"
    assert call("evaluate", own).exit_code == 2
    assert call("evaluate", own, "--trust-code", "hostile:Tower", "--exit-zero").exit_code == 0
    # The same tower may start from the weights of such a policy.
    warm = call(
        *arguments,
        "--set",
        setting,
        "--set",
        "name=warm",
        "--set",
        f"training.warm_start={own}/policy",
    )
    assert warm.exit_code == 0, warm.output


def test_a_mirrored_run_of_another_configuration_is_refused(
    trained: Path, run: Path, marker: Path
) -> None:
    change_config(run, "policy.context_tower", "module", "hostile:Tower")
    mirrors = run.parent / "mirrors"
    shutil.copytree(run, mirrors / "run")
    result = call(
        *("train", trained / "config.yaml", "--resume", "--mirror", mirrors.as_uri()),
        *("--set", f"runs={run.parent / 'new'}"),
    )
    assert result.exit_code == 2
    assert "configuration differs in: policy.context_tower.module" in " ".join(
        result.output.split()
    )
    assert not marker.exists()


def test_nested_settings_and_odd_names_are_checked() -> None:
    nested = {"a": [{"arguments": {"head": {"module": "hostile:Tower"}}}]}
    with pytest.raises(UntrustedCodeError, match=r"a\.0\.arguments\.head\.module"):
        check_code(nested, Path("x"))
    check_code(nested, Path("x"), ["hostile:Tower"])
    for name in ("os:system", "offtower.cli.__main__:main", "offtower.modelsx:A", "sklearnx.a:B"):
        for setting in ("module", "estimator"):
            with pytest.raises(UntrustedCodeError):
                check_code({setting: name}, Path("x"))
    # A tower is no estimator, and the reverse.
    with pytest.raises(UntrustedCodeError):
        check_code({"module": "sklearn.linear_model:Ridge"}, Path("x"))
    with pytest.raises(UntrustedCodeError):
        check_code({"estimator": "offtower.models.towers:Tower"}, Path("x"))
    with pytest.raises(UntrustedCodeError) as forged:
        check_code({"module": "a:b\nnothing was wrong"}, Path("x"))
    assert "\n" not in str(forged.value) and "--trust-code" not in str(forged.value)
    with pytest.raises(ConfigError, match="--trust-code"):
        check_code({}, Path("x"), ["os.system"])


@pytest.mark.parametrize(
    "path",
    [
        "sklearn.utils:check_array",
        "sklearn.datasets:load_svmlight_file",
        "sklearn.utils.discovery:import_module",
        "sklearn.pipeline:Pipeline",
        "sklearn.cluster:FeatureAgglomeration",
        "sklearn.preprocessing:FunctionTransformer",
        "sklearn.base:defaultdict",
        "subprocess:getoutput",
    ],
)
def test_only_regressors_and_classifiers_are_called(path: str) -> None:
    """Functions are not called, nor classes that read pickles from a folder (`memory`)."""
    arguments = {"memory": "cache"} if "Pipeline" in path or "cluster" in path else {}
    with pytest.raises(ConfigError, match=r"reward_model\.estimator"):
        make_estimator(RewardModelConfig("dense", estimator=path, arguments=arguments), 0)


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("sklearn.linear_model:Ridge", {"alpha": "x"}),
        ("sklearn.ensemble:StackingRegressor", {"estimators": [["a", "drop"]]}),
        (
            "sklearn.neighbors:KNeighborsRegressor",
            {"metric": "pyfunc", "metric_params": {"func": "os.system"}},
        ),
    ],
)
def test_arguments_that_an_estimator_refuses_are_an_error_for_users(
    path: str, arguments: dict[str, Any]
) -> None:
    config = RewardModelConfig("dense", estimator=path, arguments=arguments)
    pairs = np.arange(60.0).reshape(30, 2)
    with pytest.raises(ConfigError, match=f"'{path}' cannot be fitted"):
        fit_estimator(config, 0, pairs, pairs[:, 0])


def test_no_accepted_estimator_takes_a_folder_or_a_function_by_name() -> None:
    """Arguments from YAML are text, numbers and lists: none of them may be read as code."""
    from sklearn.utils import all_estimators

    found = dict(all_estimators(type_filter=["regressor", "classifier"]))
    assert "memory" not in {p for kind in found.values() for p in kind._get_param_names()}
    x, y = np.arange(8.0)[:, None], np.arange(8.0)
    for name, key in (("TransformedTargetRegressor", "func"), ("BaggingRegressor", "estimator")):
        with pytest.raises((ValueError, TypeError)):
            found[name](**{key: "os:getcwd"}).fit(x, y)


def test_a_class_from_elsewhere_is_not_taken_for_offtowers() -> None:
    with pytest.raises(ConfigError, match="declared in 'torch"):
        load_class("offtower.models.towers:Tensor", "tower module", object, "object")


SHADOWS = ("torch", "yaml", "typer", "numpy", "sklearn", "typing", "json", "pathlib")


@pytest.mark.parametrize("safe", [True, False])
def test_modules_in_the_working_folder_are_not_imported(
    run: Path, marker: Path, tmp_path: Path, safe: bool
) -> None:
    """With -P nothing comes from there; without, nothing that Python itself does not need.

    A search is enough for the first; an evaluation imports all of them.
    """
    for name in SHADOWS if safe else [n for n in SHADOWS if n not in sys.stdlib_module_names]:
        (run / f"{name}.py").write_text(HOSTILE)
    verb = ["evaluate", ".", "--exit-zero"]
    if safe:
        verb = ["search", ".", "--contexts", '{"context": [0.0, 1.0]}', "-k", "2"]
    command = [sys.executable, *(["-P"] if safe else []), "-m", "offtower.cli", *verb]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()


def test_the_script_starts_children_without_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries such as joblib start `python -m ...`, which would import from the folder."""
    from offtower import cli

    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr(cli, "app", lambda: None)
    (tmp_path / "shadow.py").write_text("print('ran')")
    cli.main()
    done = subprocess.run(
        [sys.executable, "-c", "import shadow"], cwd=tmp_path, capture_output=True, text=True
    )
    del os.environ["PYTHONSAFEPATH"]  # monkeypatch would put it back
    assert done.returncode != 0 and "ran" not in done.stdout


def test_a_policy_that_claims_more_memory_than_there_is_cannot_be_built(run: Path) -> None:
    path = run / "policy" / "policy.json"
    content = json.loads(path.read_text())
    content["policy"]["embedding_dim"] = 10**12
    write_checked_json(path, content)
    write_checksums(run / "policy")
    with pytest.raises(RunError, match=r"policy\.json' describes cannot be built"):
        load_policy(run / "policy")


def test_stored_configuration_is_compared_without_running_it(run: Path, marker: Path) -> None:
    change_config(run, "reward_model", "estimator", "hostile:Model")
    with pytest.raises(UntrustedCodeError):
        RunDirectory(run).load_config()
    assert RunDirectory(run).load_config(trust_code=["hostile:Model"]).name == "run"
    assert not marker.exists()


def test_ray_is_started_outside_of_a_folder_that_is_not_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray puts the folder of `ray.init` first on the workers' sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(PACKAGE)])
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE))
    with _without_working_folder():
        assert Path.cwd() == Path("/")
    assert Path.cwd() == tmp_path
    monkeypatch.setattr(sys, "path", [str(PACKAGE), ""])
    with _without_working_folder():
        assert Path.cwd() == tmp_path
