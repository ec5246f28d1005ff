"""The whole way over the S3 protocol: a server on this machine in place of a store.

Needs moto's server (5.2.5 was taken; a 5.2.1 failed at uploads in parts), no dependency of
the tests: pip install "moto[server]" anywhere, and OFFTOWER_TEST_MOTO=/path/to/moto_server.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs
from typer.testing import CliRunner

from offtower.cli import app
from offtower.config import to_yaml
from offtower.data import ParquetLog, copies, write_log
from offtower.data.location import Location
from offtower.errors import DataError
from tests.data.conftest import make_schema, make_table
from tests.training.conftest import make_config
from tests.training.test_resume import assert_same_policy

pytestmark = pytest.mark.slow

PARTS = ("train", "validation", "test", "catalogue")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """HOST:PORT of a server with the bucket `bucket`."""
    program = os.environ.get("OFFTOWER_TEST_MOTO")
    if program is None:
        pytest.skip("OFFTOWER_TEST_MOTO names no moto_server (see the head of this file)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "-H", "127.0.0.1", "-p", str(port)]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        patch.setenv(name, value)
    try:
        for _ in range(300):
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        place = f"127.0.0.1:{port}"
        store = fs.S3FileSystem(
            endpoint_override=place, scheme="http", region="us-east-1", allow_bucket_creation=True
        )
        store.create_dir("bucket")
        yield place
    finally:
        patch.undo()
        server.kill()
        server.wait()


def test_train_evaluate_export_from_s3(
    simulated: Path, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(copies.FOLDER, str(tmp_path / "cache"))
    options = f"?endpoint_override={endpoint}&scheme=http&region=us-east-1"
    places = {name: f"s3://bucket/logs/{name}{options}" for name in PARTS}
    for name, place in places.items():
        for found in Location.of(simulated / name).files():
            assert found.location.local is not None
            (Location.of(place) / found.location.name).send(found.location.local)
    near = make_config(simulated, tmp_path / "near", "a", "training.epochs=2")
    given = [f"data.{name}={place}" for name, place in places.items()]
    far = make_config(simulated, tmp_path / "far", "a", "training.epochs=2", *given)
    for config in (near, far):
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(config))
        run = str(config.run_directory)
        for verb in (
            ("train", str(file), "--mirror", f"s3://bucket/{config.runs.strip('/')}{options}"),
            ("evaluate", run, "--exit-zero"),
            ("export", run, "--index", "none"),
        ):
            done = CliRunner().invoke(app, list(verb))
            assert done.exit_code == 0, done.output
    assert_same_policy(far.run_directory, near.run_directory)
    mirrored = Location.of(
        f"s3://bucket/{far.runs.strip('/')}/a/policy/policy.safetensors{options}"
    )
    weights = far.run_directory / "policy" / "policy.safetensors"
    assert mirrored.read_bytes() == weights.read_bytes()


def test_what_an_s3_server_refuses(endpoint: str, tmp_path: Path) -> None:
    """Bucket, prefix, port: each is named, with what to do."""
    options = f"?endpoint_override={endpoint}&scheme=http&region=us-east-1"
    write_log(f"s3://bucket/a{options}", [make_table(300)], make_schema(), 50, 100)
    log = ParquetLog.open(f"s3://bucket/a{options}")
    for place in ("s3://nobucket/a", "s3://bucket/b"):
        with pytest.raises(DataError, match=f"there is no log at '{place}"):
            ParquetLog.open(place + options)
    with pytest.raises(DataError, match="check the bucket's name"):
        write_log(f"s3://nobucket/a{options}", [make_table(9)], make_schema())
    # Of the same length and another content: known by its tag.
    first = Location.of(f"s3://bucket/a/part-00000.parquet{options}")
    log.read_row_group(0)
    content = bytearray(first.read_bytes())
    content[100] ^= 1
    first.write_bytes(bytes(content))
    with pytest.raises(DataError, match="has changed since it was opened"):
        log.read_row_group(1)
    with pytest.raises(DataError, match="cannot be reached"):
        ParquetLog.open("s3://bucket/a?endpoint_override=127.0.0.1:1&scheme=http&region=x")
