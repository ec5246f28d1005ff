"""Start a run from the weights and the optimizer state of an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.ancestry import EarlierRun, open_earlier_run
from offtower.config import Config, to_dict
from offtower.data.catalogue import Catalogue
from offtower.data.extension import TableRows
from offtower.errors import OfftowerError
from offtower.imports import code_paths
from offtower.models.optimizer import JointOptimizer
from offtower.models.policy import TwoTowerPolicy
from offtower.models.row_mapping import (
    map_optimizer_state,
    map_weights,
    start_new_items,
    table_weights,
)
from offtower.models.table_optimizer import LazyAdamW, RowwiseAdagrad
from offtower.prepare import ExtendedRows, PreparedData, catalogue_schema
from offtower.progress import Progress
from offtower.training.checkpoints.reading import newest_tensors

Origins = Mapping[tuple[str, str], NDArray[np.int64]]
State = dict[str, dict[str, Tensor]]
"""State of an optimizer by parameter and key."""

_UNKNOWN_PART = ".unknown"


@dataclass(frozen=True)
class Continuation:
    """What a run takes from an earlier one.

    Attributes:
        policy: whole, with the earlier run's weights.
        earlier: the run, with its policy.
        origins: of the rows of its tables.
        config: of the new run.
        note: receives messages.
    """

    policy: TwoTowerPolicy
    earlier: EarlierRun
    origins: Origins
    config: Config
    note: Callable[[str], None] = field(repr=False)

    def fill_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        policy: TwoTowerPolicy,
        rows: Mapping[str, Tensor],
    ) -> None:
        """Let an optimizer go on from the state of the earlier run's newest checkpoint.

        Without a state for the same kind of updates it begins anew, which a message says.

        Args:
            optimizer: of the parameters of `policy`, before its first step.
            rows: by name of a parameter, (n,) rows of the whole table that this worker has.
        """
        found = self._state(optimizer, policy)
        if isinstance(found, str):
            self.note(f"the optimizer begins without state: {found}")
            return
        numbers = {name: number for number, name in enumerate(_names(optimizer, policy))}
        content = optimizer.state_dict()
        for name, values in map_optimizer_state(found, self.policy, self.origins).items():
            picked = rows.get(name)
            content["state"][numbers[name]] = {
                key: value if picked is None or value.dim() == 0 else value[picked]
                for key, value in values.items()
            }
        optimizer.load_state_dict(content)

    def _state(self, optimizer: torch.optim.Optimizer, policy: TwoTowerPolicy) -> State | str:
        """The earlier state by parameter; or why there is none."""
        if not self.config.incremental.optimizer_state:
            return "incremental.optimizer_state is false"
        before = self.earlier.directory.load_config(trust_code=_code(self.config)).training
        if before.optimizer != self.config.training.optimizer:
            return f"the earlier run used {before.optimizer}"
        folder = self.earlier.directory.checkpoints
        tensors = newest_tensors(folder)
        if tensors is None:
            return f"'{folder}' holds no whole checkpoint"
        tensors = {k[10:]: v for k, v in tensors.items() if k.startswith("optimizer/")}
        keys = {name.rpartition("/")[2].split(".")[0] for name in tensors}
        if _stored_rule(keys) != _rule(optimizer):
            return "the earlier run updated its tables of embeddings in another way"
        names = _names(optimizer, policy)
        shapes = {name: p.shape for name, p in self.earlier.policy.named_parameters()}
        found: State = {}
        for name, value in tensors.items():
            number, _, key = name.partition("/")
            if key.endswith(_UNKNOWN_PART):
                continue
            parameter = names[int(number)]
            unknown = tensors.get(name + _UNKNOWN_PART)
            if unknown is not None:
                codes = self._codes(parameter)
                if codes is None:
                    return (
                        "the earlier run divided its tables among workers in the order of its "
                        "catalogue, which has changed or gone"
                    )
                whole = value.new_zeros(shapes[parameter][0], *value.shape[1:])
                whole[0], whole[codes] = unknown[0], value
                value = whole
            if value.dim() > 0 and value.shape[:1] != shapes[parameter][:1]:
                return f"its state of '{parameter}' has {len(value)} rows"
            found.setdefault(parameter, {})[key] = value
        return found

    def _codes(self, parameter: str) -> Tensor | None:
        """Rows of the earlier run's items in a table, in the order of its catalogue."""
        directory = self.earlier.directory
        try:
            config = directory.load_config(trust_code=_code(self.config))
            catalogue = Catalogue.open(config.data.catalogue, catalogue_schema(config))
        except OfftowerError:
            return None
        if catalogue.fingerprint != directory.manifest()["data_fingerprint"]["catalogue"]:
            return None
        feature = table_weights(self.earlier.policy)[parameter][1]
        encoding = self.earlier.policy.item_encoding.only(feature)
        code = encoding.encode(catalogue.table(0, catalogue.num_items))[feature]
        assert isinstance(code, np.ndarray)
        return torch.from_numpy(code)


def continue_run(
    config: Config, data: PreparedData, policy: TwoTowerPolicy, progress: Progress
) -> Continuation:
    """Fill a whole policy with the weights of `config.incremental.from_run`.

    Args:
        policy: with the extended encodings and the earlier run's layers (`check_same_towers`).

    Raises:
        RunError: the earlier run cannot be read.
    """
    earlier = open_earlier_run(config)
    assert data.rows is not None, "the encodings of a run that goes on are extended"
    origins = _origins(data.rows)
    map_weights(policy, earlier.policy, origins)
    if not config.incremental.replay.logs:
        progress.note(
            "note: no older rows are replayed, and training on a short log alone can lose value: "
            "name older logs (incremental.replay.logs)"
        )
    if config.incremental.new_rows == "features":
        items = data.items.part(0, data.items.num_items)
        predicted = start_new_items(policy, items, origins, config.training.item_chunk)
        if predicted:
            progress.note(f"{predicted:,} new items start from their features")
    return Continuation(policy, earlier, origins, config, progress.note)


def _origins(rows: ExtendedRows) -> dict[tuple[str, str], NDArray[np.int64]]:
    sides: Mapping[str, Mapping[str, TableRows]] = {"context": rows.context, "item": rows.item}
    return {
        (side, name): one.origin for side, found in sides.items() for name, one in found.items()
    }


def _code(config: Config) -> list[str]:
    return code_paths(to_dict(config))


def _names(optimizer: torch.optim.Optimizer, policy: TwoTowerPolicy) -> list[str]:
    """Names of an optimizer's parameters, by their numbers in its state."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _rule(optimizer: torch.optim.Optimizer) -> str:
    tables = optimizer.tables if isinstance(optimizer, JointOptimizer) else optimizer
    if isinstance(tables, LazyAdamW):
        return "lazy_adamw"
    return "rowwise_adagrad" if isinstance(tables, RowwiseAdagrad) else "dense"


def _stored_rule(keys: set[str]) -> str:
    if "fresh_at" not in keys:
        return "dense"
    return "rowwise_adagrad" if "sum" in keys else "lazy_adamw"
