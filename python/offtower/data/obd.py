"""The Open Bandit Dataset sample that ships inside the obp package, as a log and a catalogue.

Source: Saito, Aihara, Matsutani and Narita, "Open Bandit Dataset and Pipeline", NeurIPS 2021
(Datasets and Benchmarks). 10,000 impressions per campaign and behavior policy ("random": uniform,
"bts": Bernoulli Thompson sampling). The CSV files are read with pyarrow; obp is not imported.

What the files do not say, found by comparing them:

- The hashes of user features are the same in both policies' files (same values, same frequencies),
  so users are comparable between the policies and the hashes are kept.
- The hashes of item features differ between the two files of a campaign, but split the items in the
  same way and `item_feature_0` is equal. Items are therefore described by one file, by `item_id`.
- `item_id` counts from 0, `position` from 1. A row's propensity is that of the item at its
  position; position is part of the context.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from offtower.data.catalogue import Catalogue
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.simulate.features import vector_array
from offtower.errors import DataError, MissingExtraError

CAMPAIGNS = ("men", "women", "all")
BEHAVIOR_POLICIES = ("random", "bts")

_USER_FEATURES = tuple(f"user_feature_{i}" for i in range(4))
_ITEM_CATEGORIES = tuple(f"item_feature_{i}" for i in range(1, 4))
_AFFINITY = "user_item_affinity"
_BATCH_ROWS = 4096


def import_open_bandit(
    campaign: str = "men",
    behavior_policies: Sequence[str] = BEHAVIOR_POLICIES,
    source: str | Path | None = None,
) -> tuple[Iterator[pa.Table], LogSchema, Catalogue]:
    """Read one campaign of the Open Bandit Dataset.

    Args:
        campaign: "men", "women" or "all".
        behavior_policies: policies to read, of "random" and "bts".
        source: folder with the layout `<policy>/<campaign>/<campaign>.csv`; by default the sample
            inside the obp package.

    Returns:
        Tables of rows in the order of time, the log's schema, and the catalogue.

    Raises:
        MissingExtraError: no `source` is given and obp is not installed.
        DataError: an unknown campaign or policy, a missing file or column.
    """
    if campaign not in CAMPAIGNS:
        raise DataError(f"campaign must be one of {', '.join(CAMPAIGNS)}, but is '{campaign}'")
    policies = list(dict.fromkeys(behavior_policies))
    unknown = [policy for policy in policies if policy not in BEHAVIOR_POLICIES]
    if unknown or not policies:
        raise DataError(
            f"behavior_policies must be some of {', '.join(BEHAVIOR_POLICIES)}, but are {policies}"
        )
    folder = _bundled_folder() if source is None else Path(source)
    catalogue = _catalogue(folder / policies[0] / campaign / "item_context.csv")
    parts = [
        _log_part(folder / policy / campaign / f"{campaign}.csv", policy, catalogue.num_items)
        for policy in policies
    ]
    table = pa.concat_tables(parts)
    order = pc.sort_indices(table, sort_keys=[("timestamp", "ascending")])
    table = table.take(order).combine_chunks()
    batches = (table.slice(start, _BATCH_ROWS) for start in range(0, table.num_rows, _BATCH_ROWS))
    return batches, _schema(catalogue.num_items), catalogue


def _schema(num_items: int) -> LogSchema:
    return LogSchema(
        context=(
            *(FeatureSpec(name=name, kind="category") for name in _USER_FEATURES),
            FeatureSpec(name="position", kind="category"),
            FeatureSpec(name=_AFFINITY, kind="vector", dim=num_items),
        ),
        action="action",
        reward="reward",
        pscore="pscore",
        timestamp="timestamp",
        behavior_policy="behavior_policy",
        position="position",
        pscore_kind="marginal",
        reward_range=(0.0, 1.0),
    )


def _catalogue(path: Path) -> Catalogue:
    table = _read(path, ["item_id", "item_feature_0", *_ITEM_CATEGORIES])
    table = table.sort_by("item_id")
    schema = CatalogueSchema(
        item_id="item_id",
        features=(
            FeatureSpec(name="item_feature_0", kind="numeric"),
            *(FeatureSpec(name=name, kind="category") for name in _ITEM_CATEGORIES),
        ),
    )
    return Catalogue.from_table(table, schema)


def _log_part(path: Path, policy: str, num_items: int) -> pa.Table:
    affinity_names = [f"user-item_affinity_{i}" for i in range(num_items)]
    table = _read(
        path,
        [
            "timestamp",
            "item_id",
            "position",
            "click",
            "propensity_score",
            *_USER_FEATURES,
            *affinity_names,
        ],
    )
    affinity = np.stack(
        [table.column(name).to_numpy().astype(np.float32) for name in affinity_names], axis=1
    )
    return pa.table(
        {
            "timestamp": table.column("timestamp").cast(pa.timestamp("us", tz="UTC"), safe=False),
            "action": table.column("item_id").cast(pa.int64()),
            "position": table.column("position").cast(pa.int64()),
            "reward": table.column("click").cast(pa.float32()),
            "pscore": table.column("propensity_score").cast(pa.float64()),
            "behavior_policy": pa.array([policy] * table.num_rows),
            **{name: table.column(name).cast(pa.string()) for name in _USER_FEATURES},
            _AFFINITY: vector_array(affinity),
        }
    )


def _read(path: Path, columns: list[str]) -> pa.Table:
    if not path.is_file():
        raise DataError(
            f"no file '{path}'; expected <policy>/<campaign>/{path.name} below the source"
        )
    options = csv.ConvertOptions(include_columns=columns)
    try:
        return csv.read_csv(path, convert_options=options)
    except (pa.ArrowInvalid, KeyError) as error:
        raise DataError(f"'{path}' is not a file of the Open Bandit Dataset: {error}") from error


def _bundled_folder() -> Path:
    """The sample inside obp, found without importing obp."""
    spec = importlib.util.find_spec("obp")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(location) / "dataset" / "obd"
        if folder.is_dir():
            return folder
    raise MissingExtraError("obp", "obp", "the Open Bandit Dataset sample")
