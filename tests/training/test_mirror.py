"""A copy of the run elsewhere: what a lost machine's successor goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from offtower.data.location import Location
from offtower.errors import DataError, RunError
from offtower.mirror import Mirror
from offtower.training import run as runs
from offtower.training.checkpoints import CheckpointStore
from offtower.training.run import train_run
from tests.stores import unruly
from tests.training.conftest import EVERY_STEP, make_config
from tests.training.test_resume import assert_same_policy


class _Lost(Exception):
    pass


def test_another_machine_goes_on(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is lost in the second epoch, run directory and all; the policy is that of an
    uninterrupted run, to the bit."""
    whole = make_config(simulated, tmp_path / "whole", "a", "training.epochs=2")
    train_run(whole)
    config = make_config(simulated, tmp_path / "here", "a", "training.epochs=2", EVERY_STEP)
    uri = f"file://{tmp_path}/there"

    class Lost(CheckpointStore):
        def save(self, policy: Any, optimizer: Any, progression: Any, extra: Any = None) -> None:
            super().save(policy, optimizer, progression, extra)
            if progression.step == 30:
                raise _Lost

    monkeypatch.setattr(runs, "CheckpointStore", Lost)
    with pytest.raises(_Lost):
        train_run(config, mirror=uri)
    monkeypatch.undo()
    copy = tmp_path / "there" / "a"
    assert sorted((copy / "checkpoints").glob("step_*/state.json"))
    shutil.rmtree(tmp_path / "here")
    train_run(config, resume=True, mirror=uri)
    assert_same_policy(config.run_directory, whole.run_directory)
    assert_same_policy(copy, whole.run_directory)
    kept = [p.name for p in sorted((config.run_directory / "checkpoints").iterdir())]
    sent = {p.parent.name for p in (copy / "checkpoints").glob("*/state.json")}
    assert set(kept) <= sent


def test_a_copy_that_was_cut_short_is_passed_over(simulated: Path, tmp_path: Path) -> None:
    """Its newest checkpoint lacks the file that comes last."""
    config = make_config(simulated, tmp_path / "here", "a", "training.epochs=2")
    uri = f"file://{tmp_path}/there"
    train_run(config, mirror=uri)
    newest = sorted((tmp_path / "there" / "a" / "checkpoints").glob("step_*"))[-1]
    (newest / "state.json").unlink()
    shutil.rmtree(tmp_path / "here")
    assert Mirror(uri, config.run_directory).pull()
    policy = tmp_path / "there" / "a"
    shutil.rmtree(config.run_directory / "policy")
    train_run(config, resume=True)
    assert_same_policy(config.run_directory, policy)


def test_folders_without_their_checksums_are_written_again(simulated: Path, tmp_path: Path) -> None:
    """The copy ended while they were sent: `checksums.json` comes last."""
    config = make_config(simulated, tmp_path / "here", "a", "training.epochs=2")
    train_run(config)
    run = config.run_directory
    shutil.copytree(run, tmp_path / "whole")
    for folder in ("encodings", "reward_model"):
        (run / folder / "checksums.json").unlink()
    shutil.rmtree(run / "policy")
    train_run(config, resume=True)
    assert_same_policy(run, tmp_path / "whole")
    assert (run / "encodings" / "checksums.json").exists()


def test_a_run_that_is_here_is_not_overwritten(simulated: Path, tmp_path: Path) -> None:
    config = make_config(simulated, tmp_path / "here", "a", "training.epochs=1")
    uri = f"file://{tmp_path}/there"
    train_run(config, mirror=uri)
    (tmp_path / "there" / "a" / "manifest.json").write_text("older")
    assert not Mirror(uri, config.run_directory).pull()
    assert (config.run_directory / "manifest.json").read_text() != "older"


def test_failed_uploads_are_reported_at_the_end(simulated: Path, tmp_path: Path) -> None:
    config = make_config(simulated, tmp_path / "here", "a", "training.epochs=1")
    (tmp_path / "there").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"the run at .* is complete, but its copy at .* is not"):
        train_run(config, mirror=f"file://{tmp_path}/there")
    assert (config.run_directory / "policy" / "policy.json").exists()


def test_an_address_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--mirror 'nonsense://x' cannot be used"):
        Mirror("nonsense://x", tmp_path)


def test_names_that_leave_the_copy_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing of a store is data: a name may not lead out of the run."""
    handler, root = unruly(monkeypatch, tmp_path / "store")
    folder = tmp_path / "store" / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: a")
    (tmp_path / "store" / "runs" / "evil").write_text("x")
    listed = handler.get_file_info_selector

    def get_file_info_selector(selector: fs.FileSelector) -> list[fs.FileInfo]:
        evil = fs.FileInfo("runs/a/../evil", fs.FileType.File, size=1)
        return [*listed(selector), evil]

    monkeypatch.setattr(handler, "get_file_info_selector", get_file_info_selector)
    with pytest.raises(RunError, match=r"names the file '\.\./evil'"):
        Mirror(f"{root}/runs", tmp_path / "here" / "a").pull()
    assert not (tmp_path / "here" / "evil").exists() and not (tmp_path / "here" / "a").exists()
    with pytest.raises(DataError, match=r"names the file '\.\./evil'"):
        Location.of(f"{root}/runs/a").files()


def test_credentials_of_a_mirror_are_not_shown(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"s3://\*\*\*@bucket") as error:
        Mirror("s3://KEY:HUSH@bucket/runs", tmp_path / "a")
    assert "HUSH" not in str(error.value)
