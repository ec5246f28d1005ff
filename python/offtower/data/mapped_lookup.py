"""Distinct values and their index in memory-mapped files.

<directory>/values.arrow   keys.npy and order.npy, where values do not rise   lookup.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.atomic import write_text
from offtower.data.lookup import Lookup, LookupParts
from offtower.data.node_cache import Entry

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


def _mapped(path: Path) -> NDArray[Any] | None:
    if not path.exists():
        return None
    # As a plain array, whose slices are cheaper than those of a memmap.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
