"""What a run of `auto` does: which rows it reads, how long each candidate trains, and when
candidates leave.

A plan may depend on the speed of the machine that made it. It is stored in the run's folder before
it is used, so that a resumed run, and a run that names it in `auto.plan`, give the same policy.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from offtower.checksums import read_checked_json, write_checked_json
from offtower.config import Config
from offtower.data.log_part import LogPart
from offtower.data.order import EpochOrder
from offtower.errors import ConfigError
from offtower.prepare import PreparedData
from offtower.seeds import derive_seed

FILE = "plan.json"
_FORMAT = 2
MIN_STEPS = 10
"""Steps of a candidate in a rung, at least."""
MIN_ROWS = 256
"""Held-out rows of a rung, at least."""
_SLACK = 1.2
"""Time over the planned one that revises nothing."""
_LEAST = 0.5
"""Share of the time for the rungs that are left, below which they are left out."""


@dataclass(frozen=True)
class CandidatePlan:
    """How long one candidate trains."""

    batch_size: int
    epochs: int
    """Passes over its rows, at most."""
    steps: int | None = None
    """Batches of all rungs together; None is all of `epochs`."""
    refit_steps: int | None = None
    """Batches of the refit; None is all of `epochs`."""
    rewarded_rows_only: bool = False
    """Whether its batches hold the rewarded rows alone, which are kept in memory."""
    thinning: int = 1
    """Of a candidate that is solved on rows in memory: one in so many rows without reward is kept,
    or of all rows where rewards are not rare."""
    seconds: float = 0.0
    """Planned training time of all members in all rungs; 0 where it is solved."""


@dataclass(frozen=True)
class Rung:
    """A stage of the race: the candidates that are left train, and are evaluated."""

    share: float
    """Share of a candidate's steps."""
    held_out_rows: int
    """Maximal number of rows for the evaluation."""
    remaining: int
    """Candidates that stay afterwards, at most."""
    evaluated_rows: int | None = None
    """Of these, the rows with exact terms, which stand for the others; None is all of them. With 0
    only regressions leave, by their losses."""
    training_seconds: float = 0.0
    """As planned."""
    evaluation_seconds: float = 0.0
    """As planned."""
    final: bool = True
    """Whether it was planned as the last one, which uses all of its held-out rows."""


@dataclass(frozen=True)
class AutoPlan:
    """The plan of a run."""

    bounded: bool
    """Whether the budget changes anything. If not, all candidates train on all rows."""
    rows: int
    """Rows of the log that are read."""
    rewarded_rows: int
    """Rewarded rows that are kept in memory; 0 where no candidate is trained on them alone."""
    members: int
    members_apart: bool
    """Whether a candidate's members are fitted one after the other, to save memory."""
    terms: Literal["exact", "sampled"]
    candidates: Mapping[str, CandidatePlan]
    """In prior order."""
    rungs: tuple[Rung, ...]
    refit_continues: bool = False
    """Whether the refit starts from the weights of the race."""
    max_embedding_dim: int | None = None
    """Largest embedding of a candidate; None does not limit it."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Candidates that do not take part, and why."""
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Estimated seconds of each stage, for messages."""
    revised: int = 0
    """Rungs after which the rest was adapted to the seconds that they took."""

    def revise(
        self, training: Sequence[float], evaluation: Sequence[float], left: Collection[str]
    ) -> AutoPlan:
        """Return the plan with the rungs that are left, and the refit, adapted to the candidates
        that are left and to the time that is left at the speed of the last rung.

        The training time of candidates that left goes to the evaluation. Factors are powers of the
        square root of two, and time may exceed the plan by a fifth, so that most runs have no other
        revision. Where less than half of the rest has time, the race ends, if it has evidence: that
        of the rung before is better than that of a few rows. A race without evidence is shortened
        until the last rung has `MIN_ROWS`, at most.

        Args:
            training: seconds that the rungs before took.
            evaluation: likewise.
            left: names of the candidates that train on.
        """
        done = len(training)
        last = self.rungs[done - 1]
        slower = max(1.0, training[-1] / max(last.training_seconds, 1e-9))
        slower_rows = slower
        if last.evaluated_rows != 0:
            slower_rows = max(1.0, evaluation[-1] / max(last.evaluation_seconds, 1e-9))
        planned = sum(one.training_seconds + one.evaluation_seconds for one in self.rungs)
        rest = [self._of(one, left) for one in self.rungs[done:]]
        wanted = sum(
            slower * one.training_seconds + slower_rows * one.evaluation_seconds for one in rest
        )
        available = _SLACK * planned - sum(training) - sum(evaluation)
        evaluated = any(one.evaluated_rows != 0 for one in self.rungs[:done])
        ends = evaluated and available < _LEAST * wanted
        least = 0.0
        if not evaluated:
            least = MIN_ROWS / max(one.evaluated_rows or MIN_ROWS for one in rest)
        share = 1.0 if ends else _rounded_down(max(available / max(wanted, 1e-9), least))
        rungs = (
            []
            if ends
            else [
                replace(
                    one,
                    share=share * one.share,
                    evaluated_rows=None
                    if one.evaluated_rows is None
                    else one.evaluated_rows and max(MIN_ROWS, int(share * one.evaluated_rows)),
                    training_seconds=share * slower * one.training_seconds,
                    evaluation_seconds=share * slower_rows * one.evaluation_seconds,
                )
                for one in rest
            ]
        )
        refit = _rounded_down(_SLACK / slower)
        candidates = {
            name: one
            if one.refit_steps is None
            else replace(one, refit_steps=max(MIN_STEPS, int(refit * one.refit_steps)))
            for name, one in self.candidates.items()
        }
        if share == refit == 1.0 and not ends:
            return replace(self, rungs=(*self.rungs[:done], *rest), revised=done)
        return replace(
            self, rungs=(*self.rungs[:done], *rungs), candidates=candidates, revised=done
        )

    def _of(self, rung: Rung, left: Collection[str]) -> Rung:
        """A later rung for the candidates that are left."""
        if not any(one.seconds for one in self.candidates.values()):
            return rung  # Plans of earlier versions do not have them.
        needed = rung.share * sum(self.candidates[name].seconds for name in left)
        freed = rung.training_seconds - needed
        if not rung.evaluated_rows or not rung.evaluation_seconds > 0.0 or freed <= 0.0:
            return rung
        return replace(
            rung,
            evaluated_rows=int(rung.evaluated_rows * (1.0 + freed / rung.evaluation_seconds)),
            training_seconds=needed,
            evaluation_seconds=rung.evaluation_seconds + freed,
        )

    def to_dict(self) -> dict[str, Any]:
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], name: object) -> AutoPlan:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: `content` is not a plan.
        """
        try:
            fields = {key: value for key, value in content.items() if key != "format"}
            if content["format"] != _FORMAT:
                raise ConfigError(
                    f"'{name}' holds a plan of format {content['format']}; this version of "
                    f"offtower reads format {_FORMAT}"
                )
            fields["candidates"] = {k: CandidatePlan(**v) for k, v in fields["candidates"].items()}
            fields["rungs"] = tuple(Rung(**rung) for rung in fields["rungs"])
            fields["notes"] = tuple(fields["notes"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"'{name}' is not a plan of auto: {error}") from error

    def fitting(self, names: Collection[str], log_rows: int) -> AutoPlan:
        """Return this plan of another run, if it fits the candidates and the log of this one.

        Raises:
            ConfigError: it plans other candidates, or more rows than there are.
        """
        planned = {*self.candidates, *self.dropped}
        if planned != set(names):
            raise ConfigError(
                f"auto.plan is for the candidates {', '.join(sorted(planned))}, and this run has "
                f"{', '.join(sorted(names))}: set auto.candidates alike, or unset auto.plan"
            )
        if self.rows > log_rows:
            raise ConfigError(
                f"auto.plan reads {self.rows:,} rows, and the log has {log_rows:,}: unset auto.plan"
            )
        return replace(self, revised=len(self.rungs))

    def limited(self, data: PreparedData, config: Config) -> PreparedData:
        """Return the data with the rows of the log that the plan reads: the first windows of a
        seeded order of its row groups."""
        groups = groups_to_read(data, config, self.rows)
        if len(groups) == len(data.train.row_group_sizes):
            return data
        return replace(data, train=LogPart(data.train, groups))


def _rounded_down(share: float) -> float:
    """The largest power of the square root of two that is not above `share`, at most 1."""
    return min(1.0, math.pow(2.0, math.floor(2.0 * math.log2(share)) / 2.0))


def groups_to_read(data: PreparedData, config: Config, rows: int) -> list[int]:
    """Row groups of a seeded order that have at least `rows` rows together, ascending."""
    sizes = data.train.row_group_sizes
    if rows >= data.train.num_rows:
        return list(range(len(sizes)))
    seed = derive_seed(config.seed, "auto rows")
    # Windows of one row group each: their order is that of the shuffled row groups.
    order = [group for (group,) in EpochOrder(sizes, 1, seed, window_rows=1).windows(0)]
    enough = int(np.searchsorted(np.cumsum(sizes[order]), rows)) + 1
    return sorted(order[:enough])


def read_plan(path: Path) -> AutoPlan:
    """Read a plan from its file, or from the folder of the run that has it.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    file = next((f for f in (path / "auto" / FILE, path / FILE) if f.exists()), path)
    if not file.is_file():
        raise ConfigError(
            f"auto.plan: there is no plan at '{path}': name the folder of a run of auto, or its "
            f"file auto/{FILE}"
        )
    return AutoPlan.from_dict(read_checked_json(file, ConfigError), file)


def write_plan(path: Path, plan: AutoPlan) -> None:
    """Store a plan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked_json(path, plan.to_dict())
