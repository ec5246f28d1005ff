"""Distinct values and their index in memory-mapped files.

<directory>/values.arrow   keys.npy and order.npy, where values do not rise   lookup.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offtower.atomic import sha256_file, write_text
from offtower.data.columns import as_array
from offtower.data.lookup import Lookup, LookupParts, Vocabulary
from offtower.data.node_cache import SHARE_ABOVE, Entry, built_entry

BYTES_OF_VALUE = 36
"""Of a text with its key and number, about; integers take 20."""
_VALUES, _KEYS, _ORDER, _FACTS = "values.arrow", "keys.npy", "order.npy", "lookup.json"


def write_lookup(directory: Path, lookup: Lookup) -> None:
    """Write a lookup without duplicates."""
    parts = lookup.parts()
    batch = pa.record_batch([parts.values], names=["value"])
    with (
        pa.OSFile(str(directory / _VALUES), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    for name, array in ((_KEYS, parts.sorted_keys), (_ORDER, parts.order)):
        if array is not None:
            np.save(directory / name, array)
    write_text(directory / _FACTS, json.dumps({"most_alike": parts.most_alike}) + "\n")


def open_lookup(entry: Entry) -> Lookup:
    """Map the files that `write_lookup` wrote to an entry."""
    directory = entry.path
    # The file stays mapped for as long as the values live.
    with pa.memory_map(str(directory / _VALUES)) as source:
        values = pa.ipc.open_file(source).get_batch(0).column(0)
    keys, order = (_mapped(directory / name) for name in (_KEYS, _ORDER))
    facts = json.loads((directory / _FACTS).read_text(encoding="utf-8"))
    return Lookup.of_parts(LookupParts(values, keys, order, facts["most_alike"]), entry)


def open_vocabulary(file: Path, share_above: int = SHARE_ABOVE) -> Vocabulary:
    """Read the column `value` of a Parquet file; one of more than `share_above` bytes with its
    index is mapped from files that the processes of a machine share."""

    def values() -> pa.Array:
        return as_array(pq.read_table(file).column("value"))

    rows = pq.read_metadata(file).num_rows
    size = rows * BYTES_OF_VALUE
    if size > share_above:

        def build(folder: Path) -> None:
            write_lookup(folder, Lookup(values()))

        entry = built_entry(sha256_file(file)[:32], size, build, f"a vocabulary of {rows:,} values")
        if entry is not None:
            lookup = open_lookup(entry)
            return Vocabulary(lookup.values, lookup)
    return Vocabulary(values())


def _mapped(path: Path) -> NDArray[Any] | None:
    if not path.exists():
        return None
    # As a plain array, whose slices are cheaper than those of a memmap.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
