"""Paths and addresses: what they mean, what is refused, and that text opens again."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from offtower.data import stores
from offtower.data.location import Location
from offtower.errors import DataError
from tests.stores import in_memory

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\x00"), min_size=1).filter(
    lambda name: name not in (".", "..")
)
ROOTS = (
    "s3://bucket",
    "s3://bucket/a%20b",
    "gs://bucket/x",
    "abfs://c@account.dfs.core.windows.net/p",
)


@given(st.sampled_from(ROOTS), st.sampled_from(("", "?region=eu-west-1")), NAMES, NAMES)
def test_text_opens_again(root: str, options: str, folder: str, name: str) -> None:
    """A file below a folder, by its text and sent to another process, is the same object."""
    if not root.startswith("s3"):
        options = ""
    elif not options:
        options = "?region=us-east-1"
    place = Location.of(root + options) / folder / name
    assert str(place).endswith(options)
    for again in (Location.of(str(place)), pickle.loads(pickle.dumps(place))):
        assert (again, again.path) == (place, place.path)
        assert again.filesystem == place.filesystem
    assert place.parent == Location.of(root + options) / folder
    assert place.path.endswith(f"/{folder}/{name}")


@pytest.mark.parametrize(
    ("address", "path", "kind"),
    [
        ("s3://bucket/logs/?region=x", "bucket/logs", fs.S3FileSystem),
        ("s3://bucket?region=x", "bucket", fs.S3FileSystem),
        ("gs://bucket/logs", "bucket/logs", fs.GcsFileSystem),
        ("abfss://box@account.dfs.core.windows.net/logs", "box/logs", fs.AzureFileSystem),
    ],
)
def test_addresses_resolve_to_file_systems_and_paths(address: str, path: str, kind: type) -> None:
    place = Location.of(address)
    assert place.path == path and isinstance(place.filesystem, kind) and place.local is None


def test_files_of_this_machine_stay_paths(tmp_path: Path) -> None:
    for text in (str(tmp_path), tmp_path, f"file://{tmp_path}", f"file://localhost{tmp_path}"):
        assert Location.of(text).local == tmp_path
    assert Location.of("file:///a%20b").local == Path("/a b")
    (tmp_path / "x.y").write_bytes(b"1")
    place = Location.of(tmp_path) / "x.y"
    assert (place.kind(), place.name, place.suffix) == ("file", "x.y", ".y")
    assert (Location.of(tmp_path).kind(), (place / "no").kind()) == ("folder", None)
    assert [found.name for found in place.files()] == [""]
    assert [found.size for found in Location.of(tmp_path).files()] == [1]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "nonsense://x/y",
            "'nonsense://x' has an unknown scheme; addresses look like s3://bucket/folder",
        ),
        ("fsspec+memory://x/y", "'fsspec\\+memory://x' has an unknown scheme"),
        ("mock://x/y", "unknown scheme"),
        ("s3://key:secret@bucket/x", r"s3://\*\*\*@bucket/x carries credentials.*AWS_ACCESS_KEY"),
        ("s3://***@bucket/x", r"or did before it was stored.*AWS_ACCESS_KEY"),
        ("gs://bucket/x?access_token=secret", r"access_token=\*\*\* carries credentials"),
        ("abfs://box:key@account/x", "carries credentials"),
        ("s3://bucket/x?regin=a", "unknown option 'regin' of an s3:// address; known: region"),
        ("s3:///x?region=a", "names no bucket"),
        ("file://host/x", "names no file of this machine; write file:///folder"),
    ],
)
def test_what_is_refused(address: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        Location.of(address)
    assert "secret" not in str(error.value)


def test_an_address_normalized_by_pathlib_is_refused() -> None:
    with pytest.raises(DataError, match=r"'s3:/bucket/x' was an address that Path\(\) has cut"):
        Location.of(Path("s3://bucket/x"))


def test_small_files_in_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Location.of(f"{in_memory(monkeypatch)}/a")
    with pytest.raises(FileNotFoundError):
        (folder / "x").read_bytes()
    (folder / "x").write_bytes(b"12")
    (folder / "b/y").write_bytes(b"3")
    listed = [(one.name, one.size) for one in folder.files()]
    assert listed == [("b/y", 1), ("x", 2)]
    assert (folder / "x").read_bytes() == b"12" and (folder / "x").files()[0].size == 2
    folder.remove()
    assert not folder.exists() and folder.files() == []


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("AWS Error ACCESS_DENIED during ListObjectsV2 operation", "the role must allow listing"),
        ("AWS Error NO_SUCH_BUCKET during PutObject operation", "check the bucket's name"),
        ("AWS Error UNKNOWN (HTTP status 301) during HeadObject", r"\?region="),
        (
            "AWS Error NETWORK_CONNECTION: curlCode: 6, Could not resolve hostname",
            "cannot be reached",
        ),
        ("AWS Error SLOW_DOWN during GetObject operation", "overloaded"),
        ("Unable to load libjvm", "JAVA_HOME"),
    ],
)
def test_advice(said: str, advice: str) -> None:
    with pytest.raises(DataError, match=f"{advice}") as error:
        Location.of("s3://bucket/x?region=a").refuse(OSError(said), "read")
    assert said in str(error.value) and "s3://bucket/x" in str(error.value)
    lasting = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "301")
    assert stores.is_transient(OSError(said)) == (not any(mark in said for mark in lasting))
