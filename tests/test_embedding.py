"""Vectors of a catalogue's texts: any encoder, in chunks, continued after an interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from offtower.cli import app
from offtower.data import Catalogue, CatalogueSchema, FeatureSpec, write_catalogue
from offtower.embedding import EmbedOptions, HashedTextEncoder, embed_catalogue
from offtower.errors import ConfigError, DataError

TITLES = ["red shoes", None, "", "blue shoes", "green hat", "red hats", "ein Straßenschuh"]
HERE = "tests.test_embedding"


class Lengths:
    """Vectors of a text's length; stops where it is asked to."""

    stop_at: ClassVar[int | None] = None
    seen: ClassVar[list[str]] = []

    def __init__(self, scale: float = 1.0, wrong: str = "") -> None:
        self.scale, self.wrong = scale, wrong

    def encode(self, texts: Sequence[str]) -> Any:
        if self.stop_at is not None and len(self.seen) >= self.stop_at:
            raise KeyboardInterrupt
        self.seen.extend(texts)
        found = np.array([[len(text), self.scale] for text in texts], dtype=float)
        if self.wrong == "nan":
            found[-1] = np.nan
        if self.wrong == "rows":
            found = found[1:]
        if self.wrong == "dim" and len(texts) < 3:
            found = found[:, :1]
        if self.wrong == "raise":
            raise ValueError("no such word")
        return found


class NoEncoder:
    pass


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lengths, "seen", [])
    monkeypatch.setattr(Lengths, "stop_at", None)


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    table = pa.table({"id": np.arange(len(TITLES)), "title": TITLES, "price": [1.0] * len(TITLES)})
    features = (FeatureSpec("title", "text"), FeatureSpec("price", "numeric"))
    write_catalogue(tmp_path / "catalogue", table, CatalogueSchema("id", features))
    return tmp_path / "catalogue"


def options(**changed: Any) -> EmbedOptions:
    given = {"module": f"{HERE}:Lengths", "columns": ("title",), "name": "vector", "chunk": 3}
    return EmbedOptions(**{**given, **changed})


def vectors(path: Path, name: str = "vector") -> list[list[float]]:
    found: list[list[float]] = Catalogue.open(path).column(name).to_pylist()
    return found


def test_a_catalogue_with_vectors(catalogue: Path, tmp_path: Path) -> None:
    found = embed_catalogue(catalogue, tmp_path / "out", options(arguments={"scale": 2.0}))
    assert found == {"out": str(tmp_path / "out"), "items": 7, "dim": 2, "resumed": 0}
    assert vectors(tmp_path / "out") == [[len(text or ""), 2.0] for text in TITLES]
    opened = Catalogue.open(tmp_path / "out")
    assert [spec.name for spec in opened.schema.features] == ["title", "price", "vector"]
    assert opened.schema.features[-1] == FeatureSpec("vector", "vector", dim=2)
    assert opened.column("title").to_pylist() == TITLES
    assert {one.name for one in tmp_path.iterdir()} == {"catalogue", "out"}
    embed_catalogue(catalogue, tmp_path / "alone", options(keep=False))
    assert [s.name for s in Catalogue.open(tmp_path / "alone").schema.features] == [
        "price",
        "vector",
    ]


def test_an_interrupted_run_goes_on(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_catalogue(catalogue, tmp_path / "whole", options())
    Lengths.seen.clear()
    monkeypatch.setattr(Lengths, "stop_at", 5)
    with pytest.raises(KeyboardInterrupt):
        embed_catalogue(catalogue, tmp_path / "out", options())
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Lengths, "stop_at", None)
    with pytest.raises(DataError, match="chunks of another call"):
        embed_catalogue(catalogue, tmp_path / "out", options(chunk=2))
    Lengths.seen.clear()
    assert embed_catalogue(catalogue, tmp_path / "out", options())["resumed"] == 2
    assert Lengths.seen == [text or "" for text in [*TITLES[:3], *TITLES[6:]]]
    one, other = (tmp_path / name / "part-00000.parquet" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_an_encoder_that_changed_is_refused(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lengths, "stop_at", 2)
    with pytest.raises(KeyboardInterrupt):
        embed_catalogue(catalogue, tmp_path / "out", options())
    monkeypatch.setattr(Lengths, "stop_at", None)
    monkeypatch.setattr(Lengths, "__init__", lambda self: self.__dict__.update(scale=3.0, wrong=""))
    with pytest.raises(DataError, match="other vectors than those"):
        embed_catalogue(catalogue, tmp_path / "out", options())
    (chunk,) = (tmp_path / ".out.embedding").glob("chunk-*.npy")
    chunk.write_bytes(b"half")
    with pytest.raises(DataError, match="is damaged: remove it"):
        embed_catalogue(catalogue, tmp_path / "out", options())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"module": "nothing"}, ConfigError, "must look like 'package.module:Name'"),
        ({"module": f"{HERE}:NoEncoder"}, ConfigError, "no method encode"),
        ({"arguments": {"size": 3}}, ConfigError, "could not be built"),
        ({"columns": ("name",)}, DataError, "no feature 'name'; it has title, price"),
        ({"columns": ("price",)}, DataError, "'price' is a numeric, not text"),
        ({"name": "price"}, DataError, "a column 'price' already"),
        ({"arguments": {"wrong": "nan"}}, DataError, "NaN or infinite numbers for ''"),
        ({"arguments": {"wrong": "rows"}}, DataError, r"shape \(2, 2\) for 3 texts"),
        ({"arguments": {"wrong": "dim"}}, DataError, "vectors of 2 numbers and then of 1"),
        ({"arguments": {"wrong": "raise"}}, DataError, "failed: no such word"),
    ],
)
def test_what_is_refused(
    changed: dict[str, Any],
    error: type[Exception],
    message: str,
    catalogue: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        embed_catalogue(catalogue, tmp_path / "out", options(**changed))
    assert not (tmp_path / "out").exists()
    if not any((tmp_path / ".out.embedding").glob("chunk-*")):
        embed_catalogue(catalogue, tmp_path / "out", options())  # The corrected call goes through.


def test_vectors_of_scikit_learn(catalogue: Path, tmp_path: Path) -> None:
    arguments = ["embed", str(catalogue), "--column", "title", "--set", "dim=3", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dim"] == 3
    found = np.array(vectors(tmp_path / "out", "title_vector"))
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert again.exit_code == 2 and "exists already" in again.output
    assert (found[1] == 0.0).all() and (found[2] == 0.0).all()

    def likeness(a: int, b: int) -> float:
        return float(found[a] @ found[b] / np.linalg.norm(found[a]) / np.linalg.norm(found[b]))

    # Shoes are like shoes, and hats like hats, in spite of the plural.
    assert likeness(0, 3) > likeness(0, 4) and likeness(4, 5) > likeness(4, 3)
    encoder = HashedTextEncoder(2)
    encoder.fit(["one text", "another text", "words"])
    np.testing.assert_allclose(encoder.encode(["words", "x"])[:1], encoder.encode(["words"]))
