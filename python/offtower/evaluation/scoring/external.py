"""Scores of policies that offtower did not train: from a column of the log, or from embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.config import ServingConfig
from offtower.data.encoding import FeatureEncoding
from offtower.data.rows import EncodedRows
from offtower.data.schema import FeatureSpec
from offtower.errors import DataError
from offtower.evaluation.rows import ModelPredictions
from offtower.evaluation.scoring.policy import Batches, PolicyScorer, ScoredRows
from offtower.evaluation.scoring.rewards import BatchReward
from offtower.evaluation.scoring.weighted_rows import slate_rows, weighted_rows
from offtower.models.items import ItemEmbeddings

COLUMNS_MODEL = "columns"
"""Name of the reward model whose predictions stand in columns of the log."""


@dataclass(frozen=True)
class PolicyColumns:
    """Columns of a log that describe another policy.

    Attributes:
        probability: of the logged item under the policy; of a log of slates, given the items above.
        action_reward: q of the logged item by a reward model. expected_reward: the mean of q under
            the policy. Both, or neither.
    """

    probability: str
    action_reward: str | None = None
    expected_reward: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        columns = (self.probability, self.action_reward, self.expected_reward)
        return tuple(one for one in columns if one is not None)


def columns_encoding(columns: list[PolicyColumns]) -> FeatureEncoding:
    """An encoding that passes the columns through as numbers, in float32."""
    names = list(dict.fromkeys(name for one in columns for name in one.names))
    zero, one = np.zeros(1), np.ones(1)
    return FeatureEncoding(
        tuple(FeatureSpec(name=name, kind="numeric") for name in names),
        dict.fromkeys(names, zero),
        dict.fromkeys(names, one),
        {},
    )


@dataclass(frozen=True)
class ColumnScorer:
    """Scores rows by the probabilities that stand in a column of the log.

    It cannot draw items, so that nothing is reported on the items that the policy would show.
    """

    columns: PolicyColumns
    context_encoding: FeatureEncoding

    def score_models(
        self, rows: EncodedRows, rewards: Mapping[str, BatchReward], **draws: Any
    ) -> ScoredRows:
        """As `PolicyScorer.score_models`; the reward model is that of the columns.

        Raises:
            DataError: a probability is not in [0, 1], or a prediction is not finite.
        """
        probability = self._column(rows, self.columns.probability)
        # Probabilities are read in float32, whose rounding may put 1 above 1.
        self._check(rows, self.columns.probability, (probability >= 0.0) & (probability <= 1.0))
        with np.errstate(divide="ignore"):
            log_prob = torch.from_numpy(np.log(probability))
        weighted = (
            weighted_rows(rows, log_prob)
            if rows.rounds is None
            else slate_rows(rows, rows.rounds, log_prob)
        )
        found = {}
        if self.columns.action_reward is not None and self.columns.expected_reward is not None:
            action = self._column(rows, self.columns.action_reward)
            expected = self._column(rows, self.columns.expected_reward)
            self._check(rows, self.columns.action_reward, np.isfinite(action))
            self._check(rows, self.columns.expected_reward, np.isfinite(expected))
            found[COLUMNS_MODEL] = ModelPredictions(action, expected)
        nothing = torch.zeros(len(rows), 0, dtype=torch.float32, device="cpu")
        return ScoredRows(None, weighted, found, nothing, nothing)

    def _column(self, rows: EncodedRows, name: str) -> NDArray[np.float64]:
        return np.asarray(rows.context[name], dtype=np.float64)

    def _check(self, rows: EncodedRows, name: str, fits: NDArray[np.bool_]) -> None:
        if not fits.all():
            index = int(np.argmin(fits))
            raise DataError(
                f"column '{name}' has {self._column(rows, name)[index]:g} in row "
                f"{int(rows.row[index])} of the log, which is "
                + (
                    "no probability in [0, 1]"
                    if name == self.columns.probability
                    else "not a finite number"
                )
            )


class _FixedPolicy:
    """What a scorer reads of a policy whose embeddings are given."""

    training = False
    temperature = 1.0
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.context_encoding = FeatureEncoding((), {}, {}, {})

    def eval(self) -> None:
        """Nothing changes."""

    def train(self, mode: bool) -> None:
        """Nothing changes."""


class EmbeddingScorer(PolicyScorer):
    """Scores rows by inner products of given embeddings, as a softmax or as served.

    Args:
        contexts: file of a NumPy array (rows of the log, d); it is mapped into memory.
        items: file of a NumPy array (items of the catalogue, d), in the catalogue's order.
        rows, num_items: of the log and the catalogue.
        serving: how the policy is served.

    Raises:
        DataError: a file cannot be read, or its shape does not fit.
    """

    def __init__(
        self, contexts: Path, items: Path, rows: int, num_items: int, serving: ServingConfig
    ) -> None:
        self.contexts = contexts
        self.policy: Any = _FixedPolicy()
        self.serving, self.served_logs, self._new = serving, None, None
        self._batches = Batches()
        self._training = False
        context = _array(contexts, rows, "rows of the log")
        item = _array(items, num_items, "items of the catalogue")
        if context.shape[1] != item.shape[1]:
            raise DataError(
                f"'{contexts}' has embeddings of {context.shape[1]} numbers and '{items}' of "
                f"{item.shape[1]}; both towers must have the same width"
            )
        embedding = torch.from_numpy(np.array(item, dtype=np.float32))
        if not bool(torch.isfinite(embedding).all()):
            raise DataError(f"'{items}' holds numbers that are not finite")
        self.items = ItemEmbeddings(embedding, None)
        self._rows = rows

    def __getstate__(self) -> dict[str, Any]:
        """Send the file's path, not its content."""
        state = {key: value for key, value in self.__dict__.items() if key != "_context"}
        return {**state, "_batches": Batches()}

    @cached_property
    def _context(self) -> NDArray[Any]:
        return _array(self.contexts, self._rows, "rows of the log")

    def embed_contexts(self, rows: EncodedRows) -> Tensor:
        """(n, d) the given embeddings of the rows."""
        found = np.array(self._context[rows.row], dtype=np.float32)
        finite = np.isfinite(found).all(axis=1)
        if not finite.all():
            raise DataError(
                f"'{self.contexts}' holds numbers that are not finite in row "
                f"{int(rows.row[int(np.argmin(finite))])}"
            )
        return torch.from_numpy(found)


def _array(path: Path, length: int, what: str) -> NDArray[Any]:
    """A two-dimensional array of floats in a file, mapped into memory."""
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as a NumPy array: {error}") from error
    if found.ndim != 2 or found.dtype.kind != "f":
        raise DataError(
            f"'{path}' must hold a two-dimensional array of floats, but is {found.dtype} of shape "
            f"{found.shape}"
        )
    if found.shape[0] != length:
        raise DataError(
            f"'{path}' has {found.shape[0]:,} embeddings, and there are {length:,} {what}: give "
            "one for each, in the order in which `offtower ingest` stored them"
        )
    return found
