"""Draws from the softmax policy over all N items, with propensities, in a small part of a scan.

Three ways, for one context u with logits s_a and Z = sum_a exp s_a:

- **exact** scores every item. pscore = exp(s_a) / Z.
- **softmax** (default) scores the cells that hold most of the mass and a random run of items in
  every other cell. Then W_c = (n_c / k_c) sum of exp(s_a) over the run is an unbiased estimate of
  the cell's mass Z_c (k_c = n_c: exact), and Z^ = sum_c W_c of Z. A cell is drawn with probability
  W_c / Z^, then an item of the whole cell by its exact softmax. pscore = exp(s_a) / Z^.
- **cells** draws a cell by weights that the export alone determines, then an item of that cell by
  its exact softmax: another policy than the softmax, but one whose probabilities are known exactly.

What holds for `softmax` whatever the index, the budget or the model behind it:

1. E[ 1{A = a} / pscore ] = E[W_c] / Z_c = 1 for every item a. That is all that inverse propensity
   weighting asks for: IPS on the log is unbiased, not merely up to the error of pscore.
2. Given the run of items, the item was drawn with probability exactly W_c / Z^ exp(s_a) / Z_c,
   `conditional_pscore`, which is positive for every item. Using that one is right too; it has more
   variance.
3. pscore is the softmax's own probability but for the error of Z^, whose standard error is
   reported with it (`relative_error`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offtower.errors import ConfigError, DataError
from offtower.retrieval.cells import Cells
from offtower.retrieval.design import allocate, model_cells, predicted_variance
from offtower.retrieval.scoring import score_rows

Mode = Literal["softmax", "cells", "exact"]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_HEAD_CELLS = 32
"""Cells scored first and whole: what they hold decides how well the rest must be known."""
_PEAKED_CELLS = 160
"""As many where the first ones hold more than _PEAKED_SHARE of the mass: single items decide then,
which the model of a cell's mass does not see."""
_PEAKED_SHARE = 0.3
_SCAN_SHARE = 0.4
"""Where more of the catalogue would be looked at, all of it is."""
_FEW = 20
"""Filters that leave less than one item in so many are answered from those items alone."""
_TINY = 1e-200


@dataclass(frozen=True, eq=False)
class Draws:
    """n drawn items, or the n positions of a slate."""

    item: IntArray
    """(n,) item numbers."""
    pscore: FloatArray
    """(n,) propensities; of a slate, given the positions before."""
    relative_error: FloatArray
    """(n,) standard error of pscore as a share of it; 0 where pscore is exact."""
    conditional_pscore: FloatArray
    """(n,) probability of the draw given the items that were looked at; exact."""
    rows_scored: int
    """Items whose logit was computed."""


class PropensitySampler:
    """Draws items for one context at a time.

    Args:
        cells: the catalogue.
        relative_error: standard error of pscore that `softmax` aims at, as a share of pscore.

    Raises:
        ConfigError: relative_error is not in (0, 1).
    """

    def __init__(self, cells: Cells, *, relative_error: float = 0.0025) -> None:
        if not 0.0 < relative_error < 1.0:
            raise ConfigError(f"relative_error must lie in (0, 1), got {relative_error}")
        self.cells = cells
        self.relative_error = relative_error

    def draw(
        self,
        query: NDArray[np.float32],
        rng: np.random.Generator,
        *,
        size: int = 1,
        mode: Mode = "softmax",
        exclude: IntArray | None = None,
    ) -> Draws:
        """Independent draws (with replacement) for one context.

        Args:
            query: (D,) context embedding, temperature and bias folded in.
            rng: source of the randomness.
            size: n draws; they share the items that were looked at.
            mode: see the module.
            exclude: numbers of items that must not be shown; the others' propensities are
                renormalised.

        Raises:
            DataError: a query is not finite, or no item is left.
        """
        weights = self._weights(query, rng, mode, exclude, positions=1)
        picks = [weights.draw(rng) for _ in range(size)]
        return weights.result(picks)

    def slate(
        self,
        query: NDArray[np.float32],
        rng: np.random.Generator,
        *,
        size: int,
        mode: Mode = "softmax",
        exclude: IntArray | None = None,
    ) -> Draws:
        """A slate without replacement (Plackett-Luce): n positions from the top.

        The propensity of a position is conditional on the items above it. In mode `softmax` the
        product of a slate's propensities p_1 ... p_n again satisfies E[1{slate} / product] = 1.

        Args:
            size: n positions; others as in `draw`.

        Raises:
            DataError: fewer than n items may be shown, or a query is not finite.
        """
        weights = self._weights(query, rng, mode, exclude, positions=size)
        picks = []
        for _ in range(size):
            picks.append(weights.draw(rng))
            weights.remove(picks[-1].row)
        return weights.result(picks)

    def _weights(
        self,
        query: NDArray[np.float32],
        rng: np.random.Generator,
        mode: Mode,
        exclude: IntArray | None,
        positions: int,
    ) -> _Weights:
        cells = self.cells
        if mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got '{mode}'")
        query = np.ascontiguousarray(query, dtype=np.float32)
        if query.shape != (cells.vectors.shape[1],) or not np.isfinite(query).all():
            raise DataError(
                f"a context embedding must be {cells.vectors.shape[1]} finite numbers, got "
                f"shape {query.shape}"
            )
        if positions < 1:
            raise ConfigError(f"the number of positions must be at least 1, got {positions}")
        hidden = self._rows_hidden(exclude)
        left = len(cells.item) - len(hidden)
        if left < positions:
            raise DataError(
                f"{positions} items were asked for, but filters leave {left} of {len(cells.item):,}"
            )
        if mode == "cells":
            return _Weights.by_model(cells, query, hidden)
        if mode == "exact" or left * _FEW < len(cells.item):
            return _Weights.whole(cells, query, hidden)
        return self._sampled(query, rng, hidden, positions)

    def _rows_hidden(self, exclude: IntArray | None) -> IntArray:
        """Rows of excluded items, sorted, each once."""
        if exclude is None or len(exclude) == 0:
            return np.zeros(0, dtype=np.int64)
        exclude = np.asarray(exclude, dtype=np.int64)
        if exclude.min() < 0 or exclude.max() >= len(self.cells.item):
            raise DataError(
                f"item numbers to exclude must lie in [0, {len(self.cells.item) - 1}], got "
                f"{int(exclude.min())} to {int(exclude.max())}"
            )
        return np.unique(self.cells.place[exclude])

    def _sampled(
        self, query: NDArray[np.float32], rng: np.random.Generator, hidden: IntArray, positions: int
    ) -> _Weights:
        """Look at the cells that count, and at a random run of the others."""
        cells = self.cells
        size = cells.size
        model = model_cells(cells, query)
        for wanted in (_HEAD_CELLS, _PEAKED_CELLS):
            head_cells = min(wanted, cells.num_cells)
            head = np.sort(np.argpartition(-model.log_mass, head_cells - 1)[:head_cells])
            rows = _ranges(cells.start[head], size[head])
            logit = score_rows(cells.vectors, query, rows)
            logit[_contains(hidden, rows)] = -np.inf
            shift = max(float(logit.max(initial=-np.inf)), float(model.log_mass.max()))
            mass = np.exp(model.log_mass - shift)
            mass[head] = 0.0
            inside = float(np.exp(logit - shift).sum())
            if inside < _PEAKED_SHARE * (inside + float(mass.sum())):
                break
        # Of a slate the last position must be known as well as the first: what is left when the
        # largest have been drawn.
        shown = np.exp(logit - shift)
        if positions > 1 and len(shown) >= positions:
            shown = np.partition(shown, len(shown) - positions + 1)[: len(shown) - positions + 1]
        target = self.relative_error * (float(shown.sum()) + float(mass.sum()))
        look = allocate(mass, model.variation, size, target, head)
        if look.sum() > _SCAN_SHARE * len(cells.item):
            return _Weights.whole(cells, query, hidden)
        expected = predicted_variance(mass, model.variation, size, look)
        look[head] = 0
        first = np.where(look < size, rng.integers(0, size), 0)
        rows_rest = _runs(cells.start[:-1], size, first, look)
        logit_rest = score_rows(cells.vectors, query, rows_rest)
        look[head] = size[head]
        made = _Weights.sampled(
            cells, query, hidden, look, (head, rows, logit), (rows_rest, logit_rest)
        )
        made.expected_variance = expected * float(np.exp(2.0 * (shift - made.shift)))
        return made


@dataclass(frozen=True)
class _Pick:
    row: int
    log_pscore: float
    relative_error: float
    log_conditional: float


class _Weights:
    """Weights W_c of all cells, the items of cells that were scored whole, and the draw.

    Everything is relative to exp(shift). `log_target` holds log Z^ where pscore is the softmax's.
    """

    def __init__(
        self,
        cells: Cells,
        query: NDArray[np.float32],
        hidden: IntArray,
        weight: FloatArray,
        variance: FloatArray,
        shift: float,
        rows_scored: int,
        exact_policy: bool,
    ) -> None:
        self.cells, self.query, self.hidden = cells, query, hidden
        self.weight, self.variance, self.shift = weight, variance, shift
        self.rows_scored = rows_scored
        self.by_softmax = exact_policy
        self.whole_cells: dict[int, FloatArray] = {}
        """Logits of cells that were drawn from; -inf where an item must not be shown."""
        self.expected_variance = 0.0
        """What the model of the cells expects: a run that missed its cell's few large items knows
        too little of its own variance, so the larger of the two is reported."""
        self._all: FloatArray | None = None
        self._cumulative: FloatArray | None = None

    @classmethod
    def by_model(cls, cells: Cells, query: NDArray[np.float32], hidden: IntArray) -> _Weights:
        """Weights that the export alone determines."""
        log_mass = model_cells(cells, query).log_mass
        if len(hidden):
            gone = np.bincount(cells.cell_of(hidden), minlength=cells.num_cells)
            with np.errstate(divide="ignore"):
                log_mass = log_mass + np.log1p(-gone / cells.size)
        shift = float(log_mass.max())
        weight = np.exp(log_mass - shift)
        # No cell is ruled out by rounding: an item of any of them may be a better policy's choice.
        weight[(weight < _TINY) & np.isfinite(log_mass)] = _TINY
        return cls(cells, query, hidden, weight, np.zeros(len(weight)), shift, 0, False)

    @classmethod
    def whole(cls, cells: Cells, query: NDArray[np.float32], hidden: IntArray) -> _Weights:
        """Every item scored."""
        logit = (cells.vectors @ query).astype(np.float64)
        logit[hidden] = -np.inf
        shift = float(logit.max())
        weight = np.add.reduceat(np.exp(logit - shift), cells.start[:-1])
        made = cls(cells, query, hidden, weight, np.zeros(len(weight)), shift, len(logit), True)
        made._all = logit
        return made

    @classmethod
    def sampled(
        cls,
        cells: Cells,
        query: NDArray[np.float32],
        hidden: IntArray,
        look: IntArray,
        head: tuple[IntArray, IntArray, FloatArray],
        rest: tuple[IntArray, FloatArray],
    ) -> _Weights:
        """Horvitz-Thompson estimates from the head and from runs of the other cells."""
        head_cells, head_rows, head_logit = head
        rows, logit = rest
        if len(hidden):
            logit = np.where(_contains(hidden, rows), -np.inf, logit)
        shift = max(float(head_logit.max()), float(logit.max(initial=-np.inf)))
        if not np.isfinite(shift):
            return cls.whole(cells, query, hidden)
        size = cells.size
        weight, variance = np.zeros(cells.num_cells), np.zeros(cells.num_cells)
        bounds = np.concatenate([[0], np.cumsum(size[head_cells])[:-1]])
        weight[head_cells] = np.add.reduceat(np.exp(head_logit - shift), bounds)
        others = np.ones(cells.num_cells, dtype=bool)
        others[head_cells] = False
        if others.any():
            value = np.exp(logit - shift)
            k, n = look[others].astype(np.float64), size[others]
            bounds = np.concatenate([[0], np.cumsum(look[others])[:-1]])
            total = np.add.reduceat(value, bounds)
            square = np.add.reduceat(value * value, bounds)
            weight[others] = total * (n / k)
            # Of a simple random sample without replacement (Cochran, theorem 2.4).
            inside = np.maximum(square - total * total / k, 0.0) / np.maximum(k - 1.0, 1.0)
            variance[others] = n * (n - k) / k * inside
        scored = len(head_rows) + len(rows)
        return cls(cells, query, hidden, weight, variance, shift, scored, True)

    def draw(self, rng: np.random.Generator) -> _Pick:
        if self._cumulative is None:
            self._cumulative = np.cumsum(self.weight)
        total = float(self._cumulative[-1])
        if not total > _TINY:
            self._start_again()
            return self.draw(rng)
        cell = _invert(self._cumulative, rng.random())
        logit = self._logits(cell)
        top = float(logit.max())
        inside = np.cumsum(np.exp(logit - top))
        place = _invert(inside, rng.random())
        log_inside = top + float(np.log(inside[-1]))
        log_conditional = (
            float(np.log(self.weight[cell] / total)) + float(logit[place]) - log_inside
        )
        if not self.by_softmax:
            return _Pick(int(self.cells.start[cell]) + place, log_conditional, 0.0, log_conditional)
        variance = max(float(self.variance.sum()), self.expected_variance)
        error = float(np.sqrt(variance)) / total
        log_pscore = float(logit[place]) - self.shift - float(np.log(total))
        return _Pick(int(self.cells.start[cell]) + place, log_pscore, error, log_conditional)

    def remove(self, row: int) -> None:
        """Take a drawn item out; its cell is known exactly from now on."""
        cell = int(self.cells.cell_of(np.asarray([row]))[0])
        logit = self._logits(cell)
        before = _log_sum(logit)
        logit[row - int(self.cells.start[cell])] = -np.inf
        after = _log_sum(logit)
        if self.by_softmax:
            self.weight[cell] = np.exp(after - self.shift)
            self.variance[cell] = 0.0
        else:
            self.weight[cell] *= np.exp(after - before)
        self.hidden = np.union1d(self.hidden, [row])
        self._cumulative = None

    def result(self, picks: list[_Pick]) -> Draws:
        rows = np.asarray([pick.row for pick in picks], dtype=np.int64)
        # A probability is at most 1; an estimate of one may be a rounding or an error above.
        log_pscore = np.minimum([pick.log_pscore for pick in picks], 0.0)
        return Draws(
            self.cells.item[rows],
            np.exp(log_pscore),
            np.asarray([pick.relative_error for pick in picks]),
            np.exp(np.minimum([pick.log_conditional for pick in picks], 0.0)),
            self.rows_scored,
        )

    def _logits(self, cell: int) -> FloatArray:
        """Logits of a whole cell."""
        if cell not in self.whole_cells:
            first, last = int(self.cells.start[cell]), int(self.cells.start[cell + 1])
            if self._all is not None:
                logit = self._all[first:last]
            else:
                logit = (self.cells.vectors[first:last] @ self.query).astype(np.float64)
                self.rows_scored += last - first
                inside = self.hidden[(self.hidden >= first) & (self.hidden < last)]
                logit[inside - first] = -np.inf
            self.whole_cells[cell] = logit
        return self.whole_cells[cell]

    def _start_again(self) -> None:
        """What is left of a slate underflows beside the items drawn: score all that is left."""
        fresh = _Weights.whole(self.cells, self.query, self.hidden)
        self.weight, self.variance, self.shift = fresh.weight, fresh.variance, fresh.shift
        self._all, self._cumulative, self.by_softmax = fresh._all, None, True
        self.expected_variance = 0.0
        self.whole_cells = {}
        self.rows_scored += fresh.rows_scored


def _ranges(first: IntArray, count: IntArray) -> IntArray:
    """first[0], first[0] + 1, ... for count[0] numbers, then those of the next, ..."""
    ends = np.cumsum(count)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(first - (ends - count), count)


def _runs(start: IntArray, size: IntArray, first: IntArray, count: IntArray) -> IntArray:
    """Rows of a run in each cell, from place `first`, around the cell's end to its beginning."""
    place = _ranges(first, count)
    limit = np.repeat(size, count)
    place -= np.where(place >= limit, limit, 0)
    return place + np.repeat(start, count)


def _contains(sorted_rows: IntArray, rows: IntArray) -> NDArray[np.bool_]:
    if len(sorted_rows) == 0:
        return np.zeros(len(rows), dtype=bool)
    found = np.minimum(np.searchsorted(sorted_rows, rows), len(sorted_rows) - 1)
    return np.asarray(sorted_rows[found] == rows)


def _invert(cumulative: FloatArray, uniform: float) -> int:
    """Index drawn by inversion; never one of zero weight."""
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(place, int(np.searchsorted(cumulative, cumulative[-1], side="left")))


def _log_sum(logit: FloatArray) -> float:
    top = float(logit.max(initial=-np.inf))
    return top if not np.isfinite(top) else top + float(np.log(np.exp(logit - top).sum()))
