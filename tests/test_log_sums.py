"""Parts of the pass that encodings and facts are fitted from add up to the whole, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from offtower.errors import DataError
from offtower.prepare import Encodings, OpenedData
from offtower.progress import Progress
from tests.training.conftest import make_config
from tests.training.distributed.world import write_world


def opened(folder: Path) -> OpenedData:
    return OpenedData.open(make_config(folder, folder / "runs", "a"), Progress())


def content(found: Encodings, folder: Path) -> tuple[object, dict[str, bytes]]:
    found.context.save(folder / "context")
    found.item.save(folder / "item")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return found.facts, {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_encodings_do_not_depend_on_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to nine workers, for a log of six row groups and a catalogue of five chunks: bytes of the
    encodings, and every fact, are those of one process."""
    monkeypatch.setattr("offtower.log_sums.DEFAULT_CHUNK", 3)
    data = opened(write_world(tmp_path / "world"))
    (tmp_path / "whole").mkdir()
    wanted = content(data.fit(None, Progress()), tmp_path / "whole")
    for size in (1, 2, 3, 4, 9):
        parts = [data.part(Progress(), (rank, size)) for rank in range(size)]
        assert sum(len(part.log.tables) for part in parts) == 6
        folder = tmp_path / str(size)
        folder.mkdir()
        assert content(data.fit(parts, Progress()), folder) == wanted


def test_types_that_differ_between_parts_are_refused(tmp_path: Path) -> None:
    data = opened(write_world(tmp_path / "world"))
    (spec,) = [one for one in data.train.schema.context if one.kind == "category"]
    one, two = (data.part(Progress(), (rank, 2)) for rank in (0, 1))
    types = two.log.contexts.types
    types[spec.name] = "text" if types[spec.name] != "text" else "int64"
    with pytest.raises(DataError, match=r"in one file and .* in another"):
        data.fit([one, two], Progress())
