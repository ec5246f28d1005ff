"""Damaged logs and catalogues are refused with the file's name; undamaged reading is unchanged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from offtower.cli import app
from offtower.data import Catalogue, ParquetLog, write_catalogue, write_log
from offtower.data.location import Location
from offtower.data.manifest import FILE
from offtower.data.parquet import verify_files
from offtower.data.parquet_checksums import Checksums
from offtower.errors import DataError
from offtower.retrieval.catalogue_stream import CatalogueStream
from tests.data.conftest import make_catalogue, make_schema, make_table
from tests.stores import in_memory

PART = "part-00000.parquet"


def write(folder: Path, rows: int = 40) -> Path:
    """A log of two files and a catalogue."""
    table = make_table(rows)
    write_log(folder / "log", [table], make_schema(), rows_per_group=10, rows_per_file=rows // 2)
    items = make_catalogue()
    write_catalogue(folder / "items", items.table(0, items.num_items), items.schema)
    return folder


def read_log(folder: Path) -> Any:
    return pa.concat_tables(ParquetLog.open(folder / "log").tables())


def read_catalogue(folder: Path) -> Any:
    opened = Catalogue.open(folder / "items")
    return opened.table(0, opened.num_items), opened.fingerprint


def read_stream(folder: Path) -> Any:
    return [chunk.table(0, chunk.num_items) for chunk in CatalogueStream(folder / "items").chunks()]


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "log": (f"log/{PART}", read_log),
    "log manifest": (f"log/{FILE}", read_log),
    "catalogue": (f"items/{PART}", read_catalogue),
    "catalogue manifest": (f"items/{FILE}", read_catalogue),
    "export": (f"items/{PART}", read_stream),
}


def damages(whole: bytes) -> Iterator[bytes]:
    """About 150 bits flipped, all over the file, one at a time; and truncations."""
    for position in range(0, 8 * len(whole), len(whole) // 20 | 1):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        yield bytes(damaged)
    for size in range(0, len(whole), max(1, len(whole) // 10)):
        yield whole[:size]


@pytest.mark.parametrize("kind", READERS)
def test_no_damage_is_read_as_data(tmp_path: Path, kind: str) -> None:
    name, read = READERS[kind]
    path = write(tmp_path) / name
    whole, wanted = path.read_bytes(), read(tmp_path)
    refused = total = 0
    for damaged in damages(whole):
        path.write_bytes(damaged)
        total += 1
        try:
            assert read(tmp_path) == wanted
        except DataError as error:
            assert name.split("/")[0] in str(error)
            refused += 1
    # Left are the leading magic of Parquet and white space of JSON.
    assert total > 100 and refused > 0.9 * total


def test_truncated_swapped_and_rewritten_files_are_refused_at_open(tmp_path: Path) -> None:
    folder = write(tmp_path, 40) / "log"
    one, other = folder / PART, folder / "part-00001.parquet"
    whole = one.read_bytes()
    one.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"part-00000\.parquet' has .* truncated or written again"):
        ParquetLog.open(tmp_path / "log")
    one.write_bytes(whole)
    one.rename(tmp_path / "waiting")
    other.rename(one)
    (tmp_path / "waiting").rename(other)
    with pytest.raises(DataError, match=r"part-0000\d\.parquet'"):
        ParquetLog.open(tmp_path / "log")


def test_the_fingerprint_is_one_of_the_content(tmp_path: Path) -> None:
    """Two logs of equal sizes and statistics that differ in one value differ in it."""
    table = make_table(100)
    reward = table.schema.get_field_index("reward")
    values = table["reward"].to_pylist()
    first, second = values.index(0.0), values.index(1.0)
    values[first], values[second] = values[second], values[first]
    changed = table.set_column(reward, "reward", pa.array(values))
    one = write_log(tmp_path / "one", [table], make_schema())
    same = write_log(tmp_path / "same", [table], make_schema())
    other = write_log(tmp_path / "other", [changed], make_schema())
    assert one["fingerprint"] == same["fingerprint"] != other["fingerprint"]


def test_files_that_offtower_did_not_write_stay_readable(tmp_path: Path) -> None:
    """Their page checksums, where they have some, are verified."""
    table = make_table(50)
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "b.parquet", write_page_checksum=True, compression="none")
    assert ParquetLog.open(tmp_path, make_schema()).num_rows == 100
    file = tmp_path / "b.parquet"
    content = bytearray(file.read_bytes())
    column = pq.read_metadata(file).row_group(0).column(table.schema.get_field_index("reward"))
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"row group 0 of '.*b\.parquet' cannot be read"):
        read = ParquetLog.open(tmp_path, make_schema())
        list(read.tables())


def test_damage_in_a_store_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    root = in_memory(monkeypatch)
    write_log(f"{root}/log", [make_table(40)], make_schema(), 20, 20)
    file = Location.of(f"{root}/log") / "part-00001.parquet"
    whole = file.read_bytes()
    for position in (9, len(whole) // 3, len(whole) - 30):
        damaged = bytearray(whole)
        damaged[position] ^= 8
        file.write_bytes(bytes(damaged))
        with pytest.raises(DataError, match=r"part-00001\.parquet.* cannot be read"):
            list(ParquetLog.open(f"{root}/log").tables())
        with pytest.raises(DataError, match=r"part-00001\.parquet.* is damaged"):
            verify_files(f"{root}/log", "log")
    file.write_bytes(whole)
    assert verify_files(f"{root}/log", "log") == 2


def test_checksums_of_some_columns(tmp_path: Path) -> None:
    """Those that are read are verified, nested ones too; others are not touched."""
    table = pa.table(
        {
            "a": pa.array([1.0, 2.0, 3.0]),
            "a.b": pa.array([4, 5, 6]),
            "bag": pa.array([["x"], [], ["y", "z"]]),
            "pair": pa.array([{"l": 1, "r": 2}] * 3),
        }
    )
    file = tmp_path / "t.parquet"
    pq.write_table(table, file, row_group_size=2)
    checksums = Checksums.of(file)
    assert Checksums.from_dict(checksums.to_dict()) == checksums
    with pa.OSFile(str(file)) as source:
        metadata = checksums.read_footer(source)
        for columns in (["a"], ["bag"], ["pair", "a"], ["a.b"], table.column_names):
            for group in range(2):
                found = checksums.read_row_group(source, metadata, group, columns)
                assert found.select(columns).equals(
                    table.select(columns)[2 * group : 2 * group + 2]
                )
        content = bytearray(file.read_bytes())
        content[metadata.row_group(0).column(0).data_page_offset + 30] ^= 1
        (tmp_path / "damaged").write_bytes(content)
    with pa.OSFile(str(tmp_path / "damaged")) as source:
        assert checksums.read_row_group(source, metadata, 0, ["bag"]).num_rows == 2
        with pytest.raises(OSError, match="column 'a' does not match"):
            checksums.read_row_group(source, metadata, 0, ["a", "bag"])


def test_validate_verifies_every_file(tmp_path: Path) -> None:
    write(tmp_path, 400)
    arguments = ["validate", str(tmp_path / "log"), "--catalogue", str(tmp_path / "items")]
    done = CliRunner().invoke(app, [*arguments, "--verify"])
    assert "3 files match their checksums" in done.output
    # The leading magic of a file: no reader looks at it.
    file = tmp_path / "log" / PART
    file.write_bytes(b"X" + file.read_bytes()[1:])
    assert CliRunner().invoke(app, arguments).exit_code != 2
    done = CliRunner().invoke(app, [*arguments, "--verify"])
    assert done.exit_code == 2 and PART in done.output.replace("\n", "")
    shutil.rmtree(tmp_path / "log")
    write_log(tmp_path / "log", [make_table(400)], make_schema())
    (tmp_path / "log" / FILE).unlink()
    done = CliRunner().invoke(app, [*arguments, "--verify"])
    assert done.exit_code == 2 and "no manifest" in done.output
