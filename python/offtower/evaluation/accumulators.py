"""What an evaluation accumulates over the batches of a log; parts of a log merge in its order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offtower.data.row_sketch import RowSketch
from offtower.data.unknown import UnknownValues
from offtower.evaluation.behavior.plan import BehaviorSample
from offtower.evaluation.decision.coverage import CoverageAccumulator
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.batches import LogSource, ScoredBatch
from offtower.evaluation.selection.interaction import InteractionSums
from offtower.evaluation.selection_data import SelectionRows
from offtower.evaluation.sums import EvaluationSums
from offtower.mapping import MergeTree

HISTOGRAM_EDGES = np.linspace(-4.0, 4.0, 49)
"""Bins of log10 of the importance weight; weights beyond count in the first and last."""


class EvaluationAccumulators:
    """Everything that is kept of the rows beside the estimators' sums.

    Attributes:
        coverage: items shown, logged propensities.
        histograms: by policy, rows by bin of HISTOGRAM_EDGES.
        behavior: measurements on the logging policies, by batch.
        selection: by batch, the rows of an estimator selection.
        baselines: the sums of the baseline policies.
        interactions: by policy, what chooses an interaction; nothing for rows that are no slates.
        unknown: by policy, rows with context values that its training did not see.
        sketch: of the rows.
    """

    def __init__(self, policies: Sequence[str], source: LogSource, seed: int) -> None:
        bins = len(HISTOGRAM_EDGES) - 1
        self.coverage = CoverageAccumulator(source.catalogue.num_items, source.log.num_rows, seed)
        self.histograms = {name: np.zeros(bins, dtype=np.int64) for name in policies}
        self.behavior: list[BehaviorSample] = []
        self.selection: list[SelectionRows] = []
        self.baselines: MergeTree[EvaluationSums] = MergeTree()
        self.interactions = {name: MergeTree[InteractionSums]() for name in policies}
        self.unknown = {name: UnknownValues() for name in policies}
        self.sketch = RowSketch.empty()

    def add(
        self, batch: ScoredBatch, behavior: BehaviorSample, selection: SelectionRows | None
    ) -> None:
        """Add a batch."""
        self.coverage.add(batch.encoded[0])
        if batch.encoded[0].content is not None:
            self.sketch = self.sketch.with_keys(batch.encoded[0].content)
        if batch.number == 0:
            for name, scored in batch.scored.items():
                if scored.drawn_by is not None:
                    self.coverage.probe(name, scored)
        for name, rows in batch.rows.items():
            self.histograms[name] += _histogram(rows)
            interactions = InteractionSums.of_slates(rows)
            if interactions is not None:
                self.interactions[name].add(interactions)
        for (name, scored), encoded in zip(batch.scored.items(), batch.encoded, strict=True):
            if scored.drawn_by is not None:  # Columns and embeddings of others encode nothing.
                encoding = scored.drawn_by.context_encoding
                self.unknown[name].add(encoding, encoded.context, len(encoded))
        self.behavior.append(behavior)
        if selection is not None:
            self.selection.append(selection)

    def merge(self, later: EvaluationAccumulators) -> None:
        """Add what was accumulated on later rows."""
        self.coverage.merge(later.coverage)
        self.sketch = self.sketch.merge(later.sketch)
        for name, counts in later.histograms.items():
            self.histograms[name] += counts
        for name, values in later.unknown.items():
            self.unknown[name].merge(values)
        self.behavior += later.behavior
        self.selection += later.selection
        for name, sums in later.interactions.items():
            if sums:
                self.interactions[name].add(sums.merged())
        if later.baselines:
            self.baselines.add(later.baselines.merged())


def _histogram(rows: EvaluationRows) -> NDArray[np.int64]:
    log_weight = rows.log_weight
    assert log_weight is not None
    inside = np.clip(log_weight / np.log(10.0), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return np.histogram(inside, HISTOGRAM_EDGES)[0]
