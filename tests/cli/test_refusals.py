"""What cannot be done is refused before any work: no cluster, no row read, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from typer.testing import CliRunner

import offtower.jobs.connect
import offtower.jobs.mapper
import offtower.prepare
from offtower.cli import app


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run that exists already."""
    folder = tmp_path_factory.mktemp("refusals")
    logs, path = folder / "logs", folder / "config.yaml"
    arguments = ["simulate", "--out", str(logs), "--items", "20", "--rows", "50"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    parts = ("train", "validation", "test", "catalogue")
    content: dict[str, Any] = {
        "name": "mine",
        "runs": str(folder / "runs"),
        "data": {part: str(logs / part) for part in parts},
        "objective": "ips",
        "training": {"epochs": 1, "threads": 1},
    }
    path.write_text(yaml.safe_dump(content))
    assert CliRunner().invoke(app, ["train", str(path)]).exit_code == 0
    return path


@pytest.fixture(autouse=True)
def no_work(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("work began")

    monkeypatch.setattr(offtower.jobs.connect, "connect", work)
    monkeypatch.setattr(offtower.jobs.mapper, "ray_mapper", work)
    monkeypatch.setattr(offtower.prepare, "prepare", work)


@pytest.mark.parametrize("ray", [(), ("--ray", "local")])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((), "already holds a run of this configuration. Pass --resume"),
        (("seed=3",), "holds a run whose configuration differs in: seed (0 -> 3)"),
        (("name=b", "data.train=nix"), "data.train: there is no log at 'nix'"),
        (("name=b", "data.validation=nix"), "data.validation: there is no log at 'nix'"),
        (("name=b", "data.test=nix"), "data.test: there is no log at 'nix'"),
        (("name=b", "data.catalogue=nix"), "data.catalogue: there is no catalogue at 'nix'"),
        (("name=b", "objective=atuo"), "unknown objective 'atuo'. Did you mean 'auto'?"),
        (("name=b", "objective.arguments={max: 3}"), "does not take these settings"),
        (("name=b", "training.warm_start=nix"), "training.warm_start: there is no policy at 'nix'"),
    ],
)
def test_train_refuses_at_once(
    config: Path, change: tuple[str, ...], message: str, ray: tuple[str, ...]
) -> None:
    settings = [part for one in change for part in ("--set", one)]
    assert message in refused("train", str(config), *settings, *ray)
    assert not (config.parent / "runs" / "b").exists()


def test_tune_refuses_at_once(config: Path) -> None:
    found = refused("tune", str(config), "--set", "data.validation=nix", "--ray", "local")
    assert "data.validation: there is no log at 'nix'" in found


def test_evaluate_refuses_a_missing_log_at_once(config: Path) -> None:
    run = str(config.parent / "runs" / "mine")
    assert "there is no log at 'nix'" in refused("evaluate", run, "--log", "nix", "--ray", "local")


def test_search_refuses_missing_contexts_and_an_existing_log(config: Path, tmp_path: Path) -> None:
    run = str(config.parent / "runs" / "mine")
    found = refused("search", run, "--contexts", "nix.csv", "--sample", "--log", str(config))
    assert "exists already" in found
