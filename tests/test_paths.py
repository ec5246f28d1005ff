"""Names of files are kept inside their folder, and credentials out of what is shown or stored."""

from __future__ import annotations

import pytest

from offtower.errors import DataError, RunError
from offtower.paths import redact, safe_relative


@pytest.mark.parametrize(
    "name",
    ["a", "a/b.parquet", "part=1/x..parquet", "..a", ".hidden", "a b/Ü", "city=New\xa0York/x"],
)
def test_plain_names_are_safe(name: str) -> None:
    assert safe_relative(name, "manifest.json") == name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "/etc/passwd",
            "..",
            "a/../b",
            "../a",
            "a/..",
            ".",
            "a/./b",
            "a//b",
            "a/",
            "a\nb",
            "a\0b",
        ),
        *("C:\\x", "..\\x", "a\x1b[2Jb", None, 3),
    ],
)
def test_names_that_leave_their_folder_are_refused(name: object) -> None:
    with pytest.raises(DataError, match=r"'here/manifest\.json' names the file") as refused:
        safe_relative(name, "here/manifest.json")
    assert "\n" not in str(refused.value) and "\0" not in str(refused.value)


def test_refusal_has_the_callers_error_class() -> None:
    with pytest.raises(RunError):
        safe_relative("../x", "a mirror", RunError)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:sec/ret@bucket/x", "s3://***@bucket/x"),
        ("s3://KEY:SECRET@bucket/x?region=eu", "s3://***@bucket/x?region=eu"),
        ("at 'https://me:pw@host:5000/a': no", "at 'https://***@host:5000/a': no"),
        ("https://token@host/a", "https://***@host/a"),
        ("https://user:p@ss@host/a", "https://***@host/a"),
        ("gs://b/x?access_token=abc&retry=1", "gs://b/x?access_token=***&retry=1"),
        ("https://h/x?X-Amz-Signature=ab%2F&y=1", "https://h/x?X-Amz-Signature=***&y=1"),
        ("https://h/x?sv=1&sig=ab", "https://h/x?sv=1&sig=***"),
        ("https://h/x?monkey=1", "https://h/x?monkey=1"),
        ("abfs://box@account.dfs.core.windows.net/x", None),
        ("abfs://account:key@box/x", "abfs://***@box/x"),
        ("hdfs://user@host:8020/x", None),
        ("S3://bucket/x?region=eu", None),
        ("s3://bucket/x?region=eu-west-1&endpoint_override=h:9000", None),
        ("runs/a@b:c", None),
    ],
)
def test_credentials_are_redacted(text: str, shown: str | None) -> None:
    assert redact(text) == (text if shown is None else shown)
    assert redact(redact(text)) == redact(text)
