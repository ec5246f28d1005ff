"""The HTTP server: answers, errors, the token, the swap of exports, and what it logs."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("uvicorn")

from offtower.cli import app
from offtower.data.catalogue import Catalogue
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.simulate import SimulatedWorld
from offtower.errors import ConfigError
from offtower.evaluation.run_loading import open_run
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.prepare import catalogue_schema
from offtower.retrieval import ExportOptions, Retriever, export_run
from offtower.retrieval.manifest import set_current
from offtower.run_directory import RunDirectory
from offtower.server import DecisionSettings, Limits, ServerSettings
from offtower.server.process import Address, http_server
from offtower.server.requests import ARROW
from offtower.server.settings import TOKEN_VARIABLE
from tests.retrieval.serving import Client, ipc, serving

TOKEN = "0123456789abcdef0123"


def with_users(contexts: pa.Table) -> pa.Table:
    users = pa.array([f"user {row}" for row in range(contexts.num_rows)])
    return contexts.append_column("user_id", users)


@pytest.fixture(scope="module")
def contexts(world: SimulatedWorld) -> pa.Table:
    return with_users(world.contexts(40, seed=8))


@pytest.fixture(scope="module")
def client(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("served")
    with serving(
        ServerSettings(
            exported, DecisionSettings(str(log)), Limits(contexts=50, k=100, body_bytes=100_000)
        )
    ) as found:
        yield found


def test_json_and_arrow_give_what_the_retriever_finds(
    client: Client, exported: Path, contexts: pa.Table
) -> None:
    retriever = Retriever.open(exported)
    found = retriever.search(contexts, 7)
    status, answer = client.json("/search", {"contexts": contexts.to_pylist(), "k": 7})
    assert status == 200 and answer["version"] == retriever.version
    assert [one["items"] for one in answer["contexts"]] == found.item_id
    _, table = client.arrow("/search?k=7", contexts)
    assert table.column("items").to_pylist() == found.item_id
    assert [one["score"] for one in answer["contexts"]] == table.column("score").to_pylist()
    assert np.allclose(
        np.concatenate(found.score), table.column("score").combine_chunks().flatten()
    )

    body, headers = (
        json.dumps({"contexts": contexts.to_pylist(), "k": 7}).encode(),
        {"Accept": ARROW},
    )
    again = pa.ipc.open_stream(client.send("/search", body, headers)[1]).read_all()
    assert again.column("items").to_pylist() == found.item_id

    left_out = found.item_id[0][:2]
    _, answer = client.json(
        "/search",
        {"contexts": contexts.to_pylist()[:1], "k": 5, "exclude": left_out, "exact": True},
    )
    exact = retriever.search(contexts.slice(0, 1), 5, exclude=left_out, exact=True)
    assert [one["items"] for one in answer["contexts"]] == exact.item_id
    _, table = client.arrow(
        f"/search?k=5&exact=true&exclude={left_out[0]}&exclude={left_out[1]}", contexts.slice(0, 1)
    )
    assert table.column("items").to_pylist() == exact.item_id


@pytest.mark.parametrize("k", [1, 3])
def test_what_is_served_has_weight_one_when_it_is_evaluated(
    k: int, exported: Path, run: Path, world: SimulatedWorld, tmp_path: Path
) -> None:
    """serve -> join -> ingest -> the scorer of an evaluation."""
    contexts = with_users(world.contexts(120, seed=8))
    rows = contexts.to_pylist()
    log = tmp_path / "served"
    answered: dict[str, tuple[list[str], list[float]]] = {}
    with serving(
        ServerSettings(exported, DecisionSettings(str(log), rotate_bytes=20_000), mode="exact")
    ) as client:

        def ask(start: int) -> None:
            some = slice(start, start + 6)
            if start % 4:
                _, answer = client.json("/sample", {"contexts": rows[some], "k": k})
                found = answer["contexts"]
            else:
                found = client.arrow(f"/sample?k={k}", contexts.slice(start, 6))[1].to_pylist()
            for one in found:
                answered[one["round_id"]] = (one["items"], one["pscore"])

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(ask, range(0, 120, 6)))
        # Its log is of other columns: it is in a folder of its own.
        status, _ = client.json(
            "/sample", {"contexts": rows[:1], "k": 1, "exclude": ["item-1", "no item"]}
        )
        assert status == 200
    assert not list((log / ".spool").iterdir())
    folders = sorted(
        (one for one in log.iterdir() if one.is_dir() and one.name[0] != "."), key=size
    )
    assert len(folders) == 2 and size(folders[0]) == 1
    folder = folders[1]
    assert len(list(folder.glob("*.parquet"))) > 1
    logged = pq.read_table(folder)
    assert set(logged.column("round_id").to_pylist()) == set(answered)
    for round_id, position, item, pscore in zip(
        *(logged.column(n).to_pylist() for n in ("round_id", "position", "action", "pscore")),
        strict=True,
    ):
        items, pscores = answered[round_id]
        assert (items[position], pscores[position]) == (item, pscore)

    outcomes = tmp_path / "clicks.parquet"
    pq.write_table(logged.select(["round_id", "position"]), outcomes)
    joined = tmp_path / "joined.parquet"
    call("join", folder, outcomes, "--rule", "any", "--out", joined)
    config = RunDirectory(run).load_config()
    call(
        "ingest",
        joined,
        "--schema",
        tmp_path / "joined.schema.yaml",
        "--catalogue",
        Path(str(config.data.catalogue)) / "part-00000.parquet",
        "--out",
        tmp_path / "taken",
    )
    taken = ParquetLog.open(tmp_path / "taken" / "log")
    catalogue = Catalogue.open(config.data.catalogue, catalogue_schema(config))
    opened = open_run(run, catalogue)
    scorer = PolicyScorer(opened.policy, opened.items).served_as(replace(config.serving, k=k))
    batches = scan(taken, catalogue, opened.policy.context_encoding, 4096)
    weights = np.concatenate([scorer.score(batch).importance_weight for batch in batches])
    assert len(weights) == 120 * k
    assert np.abs(weights - 1.0).max() <= 1e-5


def call(*arguments: Any) -> None:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output


def size(folder: Path) -> int:
    return int(pq.read_table(folder).num_rows)


GOOD = {"context": [0.0] * 6, "activity": 0.5, "segment": "segment-01", "interests": ["a"]}


@pytest.mark.parametrize(
    ("content", "status", "field"),
    [
        ([1], 422, None),
        ({}, 422, "contexts"),
        ({"contexts": []}, 422, "contexts"),
        ({"contexts": [GOOD] * 51}, 422, "contexts"),
        ({"contexts": [GOOD, 3]}, 422, "contexts[1]"),
        ({"contexts": GOOD, "k": "3"}, 422, "k"),
        ({"contexts": GOOD, "k": 0}, 422, "k"),
        ({"contexts": GOOD, "k": 101}, 422, "k"),
        ({"contexts": GOOD, "size": 3}, 422, "size"),
        ({"contexts": GOOD, "exclude": ["a", 1.5]}, 422, "exclude[1]"),
        ({"contexts": GOOD, "exclude": [5]}, 422, "exclude"),
        ({"contexts": GOOD, "exclude": [["a"], ["b"]]}, 422, "exclude"),
        ({"contexts": {**GOOD, "contry": "fr"}}, 422, "contexts.contry"),
        ({"contexts": {"context": [0.0] * 6}}, 422, "contexts.activity"),
        ({"contexts": [GOOD, {**GOOD, "activity": None}]}, 422, "contexts[1].activity"),
        ({"contexts": [GOOD, {**GOOD, "activity": "much"}]}, 422, "contexts[1].activity"),
        ({"contexts": {**GOOD, "activity": 1e999}}, 422, "contexts[0].activity"),
        ({"contexts": [GOOD, {**GOOD, "context": [1.0]}]}, 422, "contexts[1].context"),
        ({"contexts": {**GOOD, "context": [None] * 6}}, 422, "contexts[0].context"),
        ({"contexts": {**GOOD, "segment": {"a": 1}}}, 422, "contexts"),
    ],
    ids=str,
)
def test_an_error_names_the_field(client: Client, content: Any, status: int, field: str) -> None:
    found, answer = client.json("/search", content)
    assert (found, answer["error"]["field"]) == (status, field), answer
    assert answer["error"]["message"]


def test_a_decision_needs_the_user_that_the_log_names(client: Client) -> None:
    for contexts in (GOOD, [{**GOOD, "user_id": "a"}, {**GOOD, "user_id": None}]):
        status, answer = client.json("/sample", {"contexts": contexts})
        assert status == 422 and "user_id" in answer["error"]["field"]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/search", b"{", {}, 400),
        ("/search", b"[" * 90_000, {}, 400),
        ("/search", b"x" * 200_000, {}, 413),
        ("/search", b"{}", {"Content-Type": "text/csv"}, 415),
        ("/search", b"{}", {"Content-Type": ""}, 415),
        ("/search", b"{}", {"Content-Encoding": "gzip"}, 415),
        ("/search?k=3", b"{}", {}, 422),
        ("/search", b"not arrow", {"Content-Type": ARROW}, 400),
        ("/search", None, {}, 405),
        ("/nothing", b"{}", {}, 404),
    ],
)
def test_other_bad_requests(
    client: Client, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    found, answer = client.send(path, body, headers)
    assert found == status and json.loads(answer)["error"]["message"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from([*GOOD, "user_id", "k", "exclude", "exact", "contexts"]), value=VALUES)
def test_no_value_in_json_makes_the_server_fail(client: Client, field: str, value: Any) -> None:
    content: dict[str, Any] = {"contexts": {**GOOD, "user_id": "a"}}
    (content if field in ("k", "exclude", "exact", "contexts") else content["contexts"])[field] = (
        value
    )
    status, answer = client.json("/sample", content)
    assert status in (200, 400, 422), answer
    assert ("error" in answer) == (status != 200)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_no_damaged_stream_makes_the_server_fail(
    client: Client, contexts: pa.Table, at: int, byte: int, cut: int
) -> None:
    content = bytearray(ipc(contexts))
    content[at % len(content)] = byte
    status, _ = client.send(
        "/search?k=1", bytes(content[: len(content) - cut]), {"Content-Type": ARROW}
    )
    assert status in (200, 400, 422)


def test_streams_that_unpack_to_more_than_was_sent_are_refused(
    client: Client, contexts: pa.Table
) -> None:
    one = contexts.slice(0, 1)
    repeated = pa.RunEndEncodedArray.from_arrays(pa.array([50]), pa.array([0.5]))
    nothing = pa.array([[None] * 10_000], pa.list_(pa.null()))
    for body in (
        ipc(contexts, compression="zstd"),
        ipc(contexts.set_column(2, "segment", contexts.column("segment").dictionary_encode())),
        ipc(pa.table({**columns(pa.concat_tables([one] * 50)), "activity": repeated})),
        ipc(pa.table({**columns(one), "interests": nothing})),
        ipc(pa.table({"activity": pa.nulls(10**9)})),
    ):
        status, answer = client.send("/search", body, {"Content-Type": ARROW})
        assert status == 422 and json.loads(answer)["error"]["field"].startswith("contexts")


def columns(table: pa.Table) -> dict[str, Any]:
    return dict(zip(table.column_names, table.columns, strict=True))


def test_one_bad_request_of_a_batch_fails_alone(exported: Path, contexts: pa.Table) -> None:
    rows = contexts.to_pylist()[:5]
    with serving(ServerSettings(exported, batch_milliseconds=200.0)) as client:
        bad = {**rows[2], "activity": "1e300"}  # Not finite as a float32.
        with ThreadPoolExecutor(5) as threads:
            answers = list(
                threads.map(
                    lambda one: client.json("/search", {"contexts": one, "k": 1}),
                    [*rows[:2], bad, *rows[3:]],
                )
            )
        metrics = client.send("/metrics")[1].decode()
    assert [status for status, _ in answers] == [200, 200, 422, 200, 200], answers
    counted = re.search(r'offtower_retriever_seconds_count\{verb="search"\} (\S+)', metrics)
    assert counted is not None and float(counted[1]) >= 2


def test_the_token(
    exported: Path, contexts: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, path = {"contexts": contexts.to_pylist()[0], "k": 1}, tmp_path / "token"
    path.write_text(TOKEN + "\n")
    body = json.dumps(row).encode()
    with serving(ServerSettings(exported, token_file=path, poll_seconds=0)) as client:

        def status(token: str | None, path: str = "/search", body: bytes | None = body) -> int:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            return client.send(path, body, headers)[0]

        assert status(TOKEN) == 200
        assert {status(None), status(TOKEN[:-1]), status(TOKEN + "é")} == {401}
        assert status(None, "/health", None) == 200 and status(None, "/metrics", None) == 401
        # A token that is replaced holds from the next look on; a broken one changes nothing.
        other = TOKEN[::-1]
        path.write_text("short")
        assert status(TOKEN, "/reload", b"") == 409 and status(TOKEN) == 200
        path.write_text(other)
        assert status(TOKEN, "/reload", b"") == 200
        assert status(TOKEN) == 401 and status(other) == 200
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="token is needed"):
        http_server(ServerSettings(exported), Address("0.0.0.0"))
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
        http_server(ServerSettings(exported), Address())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls(exported: Path, tmp_path: Path) -> None:
    files = Address(port=0, certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    with pytest.raises(ConfigError, match=r"no file '.*cert\.pem'"):
        http_server(ServerSettings(exported), files)
    with pytest.raises(ConfigError, match="both a certificate and its key"):
        http_server(ServerSettings(exported), replace(files, key=None))
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-keyout", str(files.key), "-out", str(files.certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*command, *made, *name], check=True, capture_output=True)
    with serving(ServerSettings(exported), files) as client:
        context = ssl.create_default_context(cafile=str(files.certificate))
        connection = http.client.HTTPSConnection("127.0.0.1", client.port, context=context)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()


def test_exports_are_swapped_under_load_without_a_failed_request(
    run: Path, exported: Path, contexts: pa.Table
) -> None:
    options = ExportOptions(index=None, onnx=False, contexts=100, kept=20)
    versions = [exported, export_run(run, options)]
    body = {"contexts": contexts.to_pylist()[:3], "k": 5}
    expected = {
        path.name: Retriever.open(path).search(contexts.slice(0, 3), 5).item_id for path in versions
    }
    stop = threading.Event()
    with serving(ServerSettings(run, poll_seconds=0.02)) as client:

        def load(_: int) -> list[tuple[int, Any]]:
            found = []
            while not stop.is_set():
                found.append(client.json("/search", body))
            return found

        with ThreadPoolExecutor(3) as threads:
            waiting = [threads.submit(load, number) for number in range(3)]
            for number in range(6):
                set_current(run / "export", versions[number % 2].name)
                while json.loads(client.send("/health")[1])["version"] != versions[number % 2].name:
                    pass
            # An export that cannot be opened leaves the one before in place.
            (run / "export" / "CURRENT").write_text("no version\n")
            assert client.send("/reload", b"")[0] == 409
            stop.set()
            answers = [one for part in waiting for one in part.result()]
    set_current(run / "export", exported.name)
    assert {status for status, _ in answers} == {200}
    assert {answer["version"] for _, answer in answers} == set(expected)
    for _, answer in answers:
        assert [one["items"] for one in answer["contexts"]] == expected[answer["version"]]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_decisions_that_were_answered_are_in_the_log(
    how: signal.Signals, exported: Path, contexts: pa.Table, tmp_path: Path
) -> None:
    """After SIGTERM at once; after SIGKILL when a server with the same log starts."""
    log = tmp_path / "served"
    command = [sys.executable, "-m", "offtower.cli", "serve", str(exported), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--log", str(log), "--token-file", token_file(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    port = None
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
            break
    assert port is not None
    client = Client(port)
    body = json.dumps({"contexts": contexts.to_pylist()[:2], "k": 2}).encode()
    answered: list[str] = []
    enough = threading.Event()

    def load() -> None:
        while True:
            try:
                status, answer = client.send("/sample", body, {"Authorization": f"Bearer {TOKEN}"})
            except OSError:
                return
            except http.client.HTTPException:
                return
            assert status == 200, answer
            answered.extend(one["round_id"] for one in json.loads(answer)["contexts"])
            if len(answered) > 40:
                enough.set()

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert enough.wait(120)
    process.send_signal(how)
    for thread in threads:
        thread.join()
    code = process.wait(60)
    process.stderr.close()
    if how == signal.SIGKILL:
        assert not list(log.glob("*/*.parquet"))
        with serving(ServerSettings(exported, DecisionSettings(str(log)))):
            pass
    else:
        assert code in (0, -signal.SIGTERM)
    (folder,) = (one for one in log.iterdir() if one.is_dir() and not one.name.startswith("."))
    logged = pq.read_table(folder).column("round_id").to_pylist()
    assert all(logged.count(one) == 2 for one in set(logged))
    assert set(answered) <= set(logged)
    if how == signal.SIGTERM:
        assert set(answered) == set(logged)
    assert not list((log / ".spool").glob("*"))


def token_file(folder: Path) -> str:
    (folder / "token").write_text(TOKEN)
    return str(folder / "token")
