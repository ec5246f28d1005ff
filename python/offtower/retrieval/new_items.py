"""The new items of an export, where `serving.new_items` limits their share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offtower.config import NewItemsConfig, ServingConfig
from offtower.errors import ConfigError, RunError
from offtower.models.policy import TwoTowerPolicy
from offtower.retrieval.catalogue_stream import CatalogueStream
from offtower.serving.limits import new_numbers

_FILE = "new_items.npy"


def write_new_items(
    limits: NewItemsConfig,
    policy: TwoTowerPolicy,
    catalogue: CatalogueStream,
    folder: Path,
    chunk: int,
) -> None:
    """Write which items of a catalogue are new at the time of the export.

    Raises:
        ConfigError: the feature is not a number of the catalogue.
    """
    encoding = policy.item_encoding
    known = any(spec.name == limits.feature for spec in encoding.specs)
    feature = encoding.only(limits.feature) if known else encoding
    found = []
    for part in catalogue.chunks(chunk):
        values = feature.encode(part.table(0, part.num_items)).get(limits.feature)
        found.append(new_numbers(limits, encoding, values))
    np.save(folder / _FILE, np.concatenate(found))


def load_new_items(
    directory: Path, exported: ServingConfig, serving: ServingConfig
) -> NDArray[np.bool_]:
    """Read what `write_new_items` wrote.

    Args:
        exported: how the export says it is served. serving: how it is.

    Raises:
        ConfigError: the export tells new items by another rule, or by none.
        RunError: the file is damaged.
    """
    of_export, wanted = exported.new_items, serving.new_items
    assert wanted is not None
    if of_export is None or (of_export.feature, of_export.below) != (wanted.feature, wanted.below):
        raise ConfigError(
            f"the export at '{directory}' does not tell new items by '{wanted.feature}' below "
            f"{wanted.below:g}: set serving.new_items in the run's configuration and export again"
        )
    try:
        found: NDArray[np.bool_] = np.load(directory / _FILE, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RunError(f"'{directory / _FILE}' cannot be read: {error}; export again") from error
    return found
