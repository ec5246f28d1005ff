"""The run that another one goes on from, and the runs that it came from in turn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from offtower.config import Config, IncrementalConfig
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import FeatureEncoding
from offtower.data.encoding_fit import EncodingSums
from offtower.data.extension import (
    Extension,
    ExtensionBasis,
    ExtensionRules,
    TableRows,
    check_removed,
    load_rows,
)
from offtower.data.histories import HistoryBasis
from offtower.errors import ConfigError, RunError
from offtower.imports import code_paths
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy, policy_digest, stored_config
from offtower.progress import Progress
from offtower.run_directory import RunDirectory, differences

ROWS = "rows"
"""Folder in `encodings/` of a run: `TableRows` of the encodings that were extended."""
_FREE = ("temperature", "unknown_rate")
"""Settings of a policy that may differ from those of the run before."""


@dataclass(frozen=True)
class EarlierRun:
    """A finished run that another goes on from.

    Attributes:
        directory: of the run. policy: as it was stored.
        number: how many runs came before it. num_items: of its catalogue.
        context_rows, item_rows: of its tables; empty for a run that was not extended.
        settings: of the run that goes on from it.
    """

    directory: RunDirectory
    policy: TwoTowerPolicy
    number: int
    num_items: int
    context_rows: dict[str, TableRows]
    item_rows: dict[str, TableRows]
    settings: IncrementalConfig

    def extend_items(
        self, sums: EncodingSums, catalogue: Catalogue, progress: Progress
    ) -> Extension:
        """Extend the encoding of the items by a pass over a catalogue.

        Raises:
            DataError: the catalogue lacks too many items, or see `ExtensionBasis.extend`.
        """
        ids, where = HistoryBasis(catalogue.item_ids).vocabulary, "the catalogue"
        encoding = self.policy.item_encoding
        name = _id_feature(encoding, catalogue)
        before: pa.Array | int = self.num_items
        if name is not None:
            before = encoding.vocabulary(name)
        items = check_removed(before, ids, self.settings.max_removed, where)
        progress.note(f"items: {items}")
        known = {} if name is None else {name: ids}
        return self._basis(encoding, self.item_rows, known, accumulate=False).extend(sums, where)

    def extend_contexts(
        self, sums: EncodingSums, catalogue: Catalogue, progress: Progress
    ) -> Extension:
        """Extend the encoding of the contexts by a pass over a log.

        Raises:
            DataError: see `ExtensionBasis.extend`.
        """
        ids = HistoryBasis(catalogue.item_ids).vocabulary
        histories = {spec.name: ids for spec in sums.specs if spec.history}
        basis = self._basis(
            self.policy.context_encoding, self.context_rows, histories, accumulate=True
        )
        return basis.extend(sums, "the log")

    def _basis(
        self,
        encoding: FeatureEncoding,
        rows: dict[str, TableRows],
        ids: dict[str, pa.Array],
        *,
        accumulate: bool,
    ) -> ExtensionBasis:
        settings = self.settings
        rules = ExtensionRules(
            settings.min_count,
            settings.evict_after,
            settings.moving,
            settings.max_growth,
        )
        return ExtensionBasis(encoding, rows, self.number + 1, rules, accumulate, ids)


def open_earlier_run(config: Config) -> EarlierRun:
    """Open the run that `config.incremental.from_run` names.

    Raises:
        RunError: there is no run, it is unfinished, or it is this very one.
        ConfigError: its policy has other sizes.
    """
    settings = config.incremental
    assert settings.from_run is not None, "there is an earlier run"
    directory = RunDirectory(settings.from_run)
    check_earlier_run(config)
    policy, _ = load_policy(directory.policy, trust_code=code_paths(asdict(config.policy)))
    manifest = directory.manifest()
    rows = directory.encodings / ROWS
    return EarlierRun(
        directory,
        policy,
        int(manifest.get("generation", 0)),
        int(manifest["num_items"]),
        load_rows(rows / "context"),
        load_rows(rows / "item"),
        settings,
    )


def check_earlier_run(config: Config) -> None:
    """Check that `config.incremental.from_run` names a finished run, without opening it.

    Raises:
        RunError: it does not.
    """
    if config.incremental.from_run is None:
        return
    path = Path(config.incremental.from_run)
    directory = RunDirectory(path)
    if path.absolute() == config.run_directory.absolute():
        raise RunError(
            f"incremental.from_run is '{path}', the run itself: give the new run another name "
            "(--set name=...)"
        )
    if not directory.config_path.exists():
        raise RunError(
            f"incremental.from_run: '{path}' is no run (it has no config.yaml); give the folder of "
            "a finished run, such as runs/yesterday"
        )
    if not (directory.policy / "policy.json").exists() or "num_items" not in directory.manifest():
        raise RunError(
            f"incremental.from_run: the run at '{path}' is unfinished, it has no policy yet: "
            "finish it with 'offtower train CONFIG --resume', or go on from the run before it"
        )


def descent(config: Config) -> dict[str, Any]:
    """Facts for a manifest on the runs that a run goes on from; empty where there is none."""
    if config.incremental.from_run is None:
        return {}
    directory = RunDirectory(config.incremental.from_run)
    earlier = directory.manifest()
    link = {"run": str(directory.path), "policy": policy_digest(directory.policy)}
    return {
        "generation": int(earlier.get("generation", 0)) + 1,
        "descends_from": [link, *earlier.get("descends_from", ())],
    }


def earlier_folders(config: Config) -> tuple[str, ...]:
    """Folders of the policies that a policy is learned from."""
    of_run = config.incremental.from_run
    found = (
        config.training.warm_start,
        config.objective.kl_policy,
        None if of_run is None else str(RunDirectory(of_run).policy),
    )
    return tuple(one for one in found if one is not None)


def _id_feature(encoding: FeatureEncoding, catalogue: Catalogue) -> str | None:
    """The category that is the item's own id, with an embedding for each item."""
    for spec in encoding.specs:
        if (spec.kind, spec.encoding, spec.min_count) != ("category", "vocabulary", 1):
            continue
        if spec.source == catalogue.schema.item_id:
            return spec.name
    return None


def check_same_towers(policy: TwoTowerPolicy, config: Config) -> None:
    """Check that a policy has the layers of that of `config.incremental.from_run`.

    Raises:
        ConfigError: names the settings that differ.
    """
    assert config.incremental.from_run is not None, "there is an earlier run"
    directory = RunDirectory(config.incremental.from_run)
    stored = stored_config(directory.policy, trust_code=code_paths(asdict(config.policy)))
    before, after = (_layers(asdict(one)) for one in (stored, policy.config))
    found = differences(before, after)
    if not found:
        return
    if "auto" in directory.manifest():
        raise ConfigError(
            f"objective=auto chose the policy of incremental.from_run '{directory.path}': an "
            f"ensemble of {stored.context_tower.members} members, whose temperature was set on "
            "held-out rows after training. Training on would need the members' own weights and "
            "rows that they have not seen. Let auto choose anew on all logs that you keep, or "
            "begin a series of daily runs with a named objective (docs/how-to/train-daily.md)"
        )
    raise ConfigError(
        f"the policy of incremental.from_run '{directory.path}' has other layers, "
        f"whose weights cannot be mapped: {', '.join('policy.' + one for one in found)}. Use "
        "its settings, or train a new run without incremental.from_run"
    )


def _layers(content: dict[str, Any]) -> dict[str, Any]:
    """Settings of a policy without those that change no weight's shape."""
    return {
        key: _layers(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in _FREE
    }
