"""Write a catalogue with a further column of vectors, in chunks that a later run continues."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.atomic import replace_file, write_text
from offtower.data.catalogue import Catalogue, write_catalogue_tables
from offtower.data.columns import category_values, is_category
from offtower.data.location import AnyPath, Location
from offtower.data.output import check_new
from offtower.data.schema import CatalogueSchema, FeatureSpec
from offtower.errors import ConfigError, DataError
from offtower.execution import LOCAL, Execution
from offtower.imports import load_by_path

_SAMPLE = 20_000
"""Texts that an encoder is fitted on, at most: evenly spaced ones."""
_COMPARED = 8
"""Texts of the first chunk that a continued run encodes again."""


@dataclass(frozen=True)
class EmbedOptions:
    """What is encoded, and how.

    Attributes:
        module: import path "package.module:Class" of a `TextEncoder`.
        columns: features of the catalogue whose texts are joined by spaces; null is empty.
        name: of the new feature.
        arguments: of the class.
        chunk: texts that are encoded at a time.
        keep: whether the columns stay features.
    """

    module: str
    columns: tuple[str, ...]
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    chunk: int = 4096
    keep: bool = True

    def __post_init__(self) -> None:
        if not self.columns:
            raise ConfigError("name the column of the texts (--column)")
        if self.chunk < 1:
            raise ConfigError(f"a chunk must have at least 1 text, got {self.chunk}")


def embed_catalogue(
    catalogue: AnyPath, out: Path, options: EmbedOptions, *, execution: Execution = LOCAL
) -> dict[str, Any]:
    """Encode texts of a catalogue and write it, with their vectors as a feature, to a new folder.

    Encoded chunks are kept beside `out`, in a folder that is removed at the end: the same call
    after an interruption continues with the first missing chunk. `out` appears as a whole.

    Returns:
        out, items, dim, and resumed: the chunks that were there already.

    Raises:
        ConfigError: the encoder cannot be imported or built, or a setting is wrong.
        DataError: `out` exists, the catalogue has no such texts, the encoder does not return finite
            vectors of one length, or the kept chunks are of another call.
    """
    check_new(Location.of(out))
    opened = Catalogue.open(catalogue)
    columns = _columns(opened, options)
    _check_name(opened.schema, options)
    encoder = _made(options)
    chunks = _Chunks.open(out, opened, options)
    texts = _Texts(opened, columns)
    if hasattr(encoder, "fit"):
        encoder.fit(texts.sample())
    progress = execution.progress
    progress.start("embedding", opened.num_items)
    resumed = 0
    for number in range(chunks.count):
        rows = chunks.rows(number)
        if chunks.path(number).exists():
            if not resumed:
                chunks.compare(number, _encoded(encoder, texts.read(rows[:_COMPARED]), options))
            resumed += 1
        else:
            chunks.write(number, _encoded(encoder, texts.read(rows), options))
        progress.advance(len(rows))
    progress.finish()
    dim = chunks.dim()
    write_catalogue_tables(
        out, chunks.tables(opened), _schema(opened.schema, columns, options, dim)
    )
    shutil.rmtree(chunks.folder)
    return {"out": str(out), "items": opened.num_items, "dim": dim, "resumed": resumed}


@dataclass(frozen=True)
class _Texts:
    """The texts of a catalogue's items."""

    catalogue: Catalogue
    columns: tuple[FeatureSpec, ...]

    def read(self, rows: range, chosen: NDArray[np.int64] | None = None) -> list[str]:
        """The texts of some rows; of those at the indices `chosen` among them, if given."""
        table = self.catalogue.table(rows.start, rows.stop)
        if chosen is not None:
            table = table.take(pa.array(chosen))
        parts = [
            pc.fill_null(pc.cast(category_values(table.column(spec.source)), pa.string()), "")
            for spec in self.columns
        ]
        joined: list[str] = pc.binary_join_element_wise(*parts, " ").to_pylist()
        return joined

    def sample(self) -> list[str]:
        n, found = self.catalogue.num_items, []
        wanted = np.unique(np.linspace(0, n - 1, min(n, _SAMPLE)).astype(np.int64))
        for start in range(0, n, 65_536):
            rows = range(start, min(start + 65_536, n))
            here = wanted[(wanted >= rows.start) & (wanted < rows.stop)]
            if len(here):
                found += self.read(rows, here - start)
        return found


@dataclass(frozen=True)
class _Chunks:
    """Encoded chunks in a folder beside the output."""

    folder: Path
    items: int
    size: int
    name: str

    @classmethod
    def open(cls, out: Path, catalogue: Catalogue, options: EmbedOptions) -> _Chunks:
        folder = out.parent / f".{out.name}.embedding"
        state = json.dumps(
            {
                "catalogue": catalogue.fingerprint,
                "module": options.module,
                "arguments": dict(options.arguments),
                "columns": list(options.columns),
                "chunk": options.chunk,
            },
            sort_keys=True,
        )
        file = folder / "state.json"
        kept = any(folder.glob("chunk-*"))  # Without any, the earlier call failed at its first.
        if kept and file.exists() and file.read_text(encoding="utf-8") != state:
            raise DataError(
                f"'{folder}' holds chunks of another call (another catalogue, encoder, column or "
                "chunk size): repeat that call to continue it, or remove the folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, state)
        return cls(folder, catalogue.num_items, options.chunk, options.name)

    @property
    def count(self) -> int:
        return -(-self.items // self.size)

    def rows(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, self.items))

    def path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:06d}.npy"

    def write(self, number: int, vectors: NDArray[np.float32]) -> None:
        if number:
            self._check_dim(vectors.shape[1])
        with replace_file(self.path(number)) as temporary, open(temporary, "wb") as file:
            np.save(file, vectors)

    def read(self, number: int) -> NDArray[np.float32]:
        try:
            vectors: NDArray[np.float32] = np.load(self.path(number))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"'{self.path(number)}' is damaged: remove it and repeat the call ({error})"
            ) from error
        return vectors

    def dim(self) -> int:
        return int(self.read(0).shape[1])

    def compare(self, number: int, again: NDArray[np.float32]) -> None:
        """Refuse to continue with an encoder that gives other vectors than the kept ones."""
        kept = self.read(number)[: len(again)]
        if kept.shape != again.shape or not np.allclose(kept, again, rtol=1e-3, atol=1e-5):
            raise DataError(
                f"the encoder gives other vectors than those that '{self.folder}' holds from an "
                "earlier call: remove the folder to encode all texts anew"
            )

    def tables(self, catalogue: Catalogue) -> Iterator[pa.Table]:
        """The catalogue's rows with the vectors."""
        dim = self.dim()
        for number in range(self.count):
            rows, vectors = self.rows(number), self.read(number)
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
            yield catalogue.table(rows.start, rows.stop).append_column(self.name, column)

    def _check_dim(self, dim: int) -> None:
        if dim != self.dim():
            raise DataError(
                f"the encoder gave vectors of {self.dim()} numbers and then of {dim}: every text "
                "needs a vector of the same length"
            )


def _columns(catalogue: Catalogue, options: EmbedOptions) -> tuple[FeatureSpec, ...]:
    known = {spec.name: spec for spec in catalogue.schema.features}
    for name in options.columns:
        spec = known.get(name)
        if spec is None:
            raise DataError(
                f"the catalogue has no feature '{name}'; it has {', '.join(known) or 'none'}. Name "
                "the column as a feature of kind text in the schema, and ingest it"
            )
        if not is_category(catalogue.table(0, 1).column(spec.source).type):
            raise DataError(f"feature '{name}' is a {spec.kind}, not text")
    return tuple(known[name] for name in options.columns)


def _check_name(schema: CatalogueSchema, options: EmbedOptions) -> None:
    if options.name in {*schema.columns, *(spec.name for spec in schema.features)}:
        raise DataError(f"the catalogue has a column '{options.name}' already: choose another name")


def _schema(
    schema: CatalogueSchema, columns: Sequence[FeatureSpec], options: EmbedOptions, dim: int
) -> CatalogueSchema:
    kept = [spec for spec in schema.features if options.keep or spec not in columns]
    made = FeatureSpec(name=options.name, kind="vector", dim=dim)
    return replace(schema, features=(*kept, made))


def _made(options: EmbedOptions) -> Any:
    kind = load_by_path(options.module, "--module")
    try:
        encoder = kind(**options.arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the encoder '{options.module}' could not be built with "
            f"{dict(options.arguments)}: {error}"
        ) from error
    if not callable(getattr(encoder, "encode", None)):
        raise ConfigError(
            f"the encoder '{options.module}' has no method encode(texts), which returns a vector "
            "for each text"
        )
    return encoder


def _encoded(encoder: Any, texts: list[str], options: EmbedOptions) -> NDArray[np.float32]:
    """(n, dim) vectors of texts."""
    try:
        vectors = np.asarray(encoder.encode(texts), dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"the encoder '{options.module}' failed: {error}") from error
    if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
        raise DataError(
            f"the encoder '{options.module}' returned an array of shape {vectors.shape} for "
            f"{len(texts)} texts, expected one vector for each"
        )
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        text = texts[int(np.argmax(bad))]
        raise DataError(
            f"the encoder '{options.module}' gave NaN or infinite numbers for {text[:80]!r} "
            f"({int(bad.sum())} such texts in a chunk)"
        )
    return vectors
