"""Checked JSON files, folders and text: every flipped bit is found, or changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from offtower.checksums import (
    FILE,
    check_text,
    checked_directory,
    checked_text,
    read_checked_json,
    verify_directory,
    write_checked_json,
)
from offtower.errors import DataError, RunError
from offtower.metrics import MetricsLog, read_metrics
from offtower.paths import safe_relative

CONTENT = {"steps": 12, "name": "\u00e4", "low": 0.125, "files": {"a": [1, 2]}, "none": None}


def every_flip(content: bytes, step: int = 1) -> list[bytes]:
    """The content with each of its bits flipped, or each `step`-th, one at a time."""
    flips = []
    for position in range(0, 8 * len(content), step):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        flips.append(bytes(damaged))
    return flips


def test_flipped_bits_and_truncations_of_json_are_found(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_checked_json(path, CONTENT)
    whole = path.read_bytes()
    assert read_checked_json(path) == CONTENT
    refused = 0
    damages = [*every_flip(whole, 3), *(whole[:size] for size in range(0, len(whole) - 1, 7))]
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            assert read_checked_json(path) == CONTENT
        except RunError as error:
            assert str(path) in str(error)
            refused += 1
    # What is left changes white space.
    assert refused > 0.9 * len(damages)


def test_json_without_a_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps(CONTENT))
    with pytest.raises(DataError, match=r"state.json' has no checksum"):
        read_checked_json(path, DataError)


def test_every_flipped_bit_and_every_truncation_of_yaml_is_found() -> None:
    text = yaml.safe_dump(CONTENT)
    whole = checked_text(text).encode()
    for damaged in [*every_flip(whole), *(whole[:size] for size in range(1, len(whole)))]:
        try:
            said = damaged.decode()
            check_text(said, "config.yaml")
            found = yaml.safe_load(said)
            # The line itself may have become a key, which no configuration knows.
            assert found is None or {k: v for k, v in found.items() if k in CONTENT} == CONTENT
        except (UnicodeDecodeError, yaml.YAMLError, RunError):
            pass
    check_text(text, "edited by hand")
    with pytest.raises(RunError, match=r"remove that line"):
        check_text(checked_text(text).replace("12", "13"), "config.yaml")


def test_damage_to_any_file_of_a_folder_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    with checked_directory(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a.json").write_text("{}")
        np.save(temporary / "b.npy", np.arange(5))
    verify_directory(folder, "train again")
    for name in ("inner/a.json", "b.npy", "checksums.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-2])
        with pytest.raises(RunError, match=name):
            verify_directory(folder, "train again")
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 4
        (folder / name).write_bytes(damaged)
        with pytest.raises(RunError, match=name):
            verify_directory(folder, "train again")
        (folder / name).unlink()
        with pytest.raises(RunError, match=name):
            verify_directory(folder, "train again")
        (folder / name).write_bytes(whole)
    verify_directory(folder, "train again")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "", "a\nb", "..\\a", 3, "."])
def test_names_that_leave_their_folder_are_refused(tmp_path: Path, name: object) -> None:
    write_checked_json(tmp_path / "checksums.json", {"files": {name: {}}})
    with pytest.raises(RunError, match="not a plain relative path"):
        safe_relative(name, "checksums.json", RunError)
    if isinstance(name, str):
        with pytest.raises(RunError, match="not a plain relative path"):
            verify_directory(tmp_path, "train again")


@pytest.mark.parametrize(
    "content", [{}, {"files": [1]}, {"files": 3}, {"files": {"a": 3}}, {"files": {"a": {}}}]
)
def test_a_list_of_files_of_another_form_is_damage(tmp_path: Path, content: Any) -> None:
    (tmp_path / "a").write_text("x")
    write_checked_json(tmp_path / FILE, content)
    with pytest.raises(RunError, match=r"checksums\.json"):
        verify_directory(tmp_path, "restore it")


def test_a_damaged_line_of_metrics_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    lines = [{"kind": "step", "step": step, "loss": step / 7} for step in range(3)]
    for line in lines:
        log.write(line)
    whole = path.read_bytes()
    assert read_metrics(path) == lines
    for damaged in every_flip(whole, 5):
        path.write_bytes(damaged)
        caplog.clear()
        found = read_metrics(path)
        known = [{k: v for k, v in one.items() if k in lines[0]} for one in found]
        assert all(line in lines for line in known)
        assert known == lines or "damaged or incomplete, and left out" in caplog.text
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    caplog.clear()
    assert read_metrics(path, wanted=3) == lines[:1]
    assert f"'{path}' is damaged: it has 1 of 3 lines" in caplog.text
