"""Propensities: their range, what their inverses must average to, and units that give them away."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import as_float_array, category_values
from offtower.data.eligible import eligible_items
from offtower.data.findings.base import Check, Finding, Level, LogFacts, LogPart
from offtower.data.moments import Moments
from offtower.data.schema import LogSchema

_ALARM = 4.0
"""Standard errors of deviation from which an average is an error."""


@dataclass(frozen=True)
class Propensities(Check):
    """Moments of the good rows.

    Attributes:
        pscore: of the propensities.
        inverse: of 1/pscore by behavior policy, and "" for all rows.
        weight: of a target policy's probability over pscore.
        ones: rows with pscore 1.
        eligible: of the rows' numbers of eligible items, by policy as `inverse`; empty where every
            item is eligible.
    """

    pscore: Moments
    inverse: dict[str, Moments]
    weight: Moments
    ones: int
    eligible: dict[str, Moments] = field(default_factory=dict)

    @classmethod
    def of(cls, part: LogPart) -> Self:
        schema, good = part.schema, part.good
        if schema.pscore is None:
            return cls(Moments(), {}, Moments(), 0)
        logged = as_float_array(good.column(schema.pscore))
        with np.errstate(over="ignore"):  # Of propensities below 1e-308.
            inverse = 1.0 / logged
        weight = Moments()
        if part.target is not None and good.num_rows:
            weight = Moments.of(np.asarray(part.target(good), dtype=np.float64) / logged)
        return cls(
            Moments.of(logged),
            _by_policy(good, inverse, schema),
            weight,
            int(np.count_nonzero(logged == 1.0)),
            _eligible(part),
        )

    def merge(self, other: Self) -> Self:
        return type(self)(
            self.pscore.merge(other.pscore),
            _merged(self.inverse, other.inverse),
            self.weight.merge(other.weight),
            self.ones + other.ones,
            _merged(self.eligible, other.eligible),
        )

    def findings(self, facts: LogFacts) -> list[Finding]:
        if facts.schema.pscore is None:
            return [
                Finding(
                    "warning",
                    "pscore",
                    "no propensities: regression and likelihood can learn from this log, and "
                    "off-policy estimates rest on estimated propensities",
                    remedy="log the probability of what is shown (docs/how-to/log-propensities.md)",
                )
            ]
        if self.pscore.count == 0:
            return []
        found = [
            Finding(
                "info",
                "pscore",
                f"pscore from {self.pscore.smallest:.3g} to {self.pscore.largest:.3g}",
                {"smallest": self.pscore.smallest, "largest": self.pscore.largest},
            )
        ]
        if self.ones == self.pscore.count and facts.num_items > 1:
            return [*found, _all_ones(self.ones)]
        policies = [name for name in self.inverse if name] or [""]
        if facts.schema.pscore_kind == "slate":
            return found  # Their inverses count slates, not items.
        if facts.schema.weight is not None:
            text = "rows have weights: the mean of 1/pscore of a down-sampled log is not tested"
            return [*found, Finding("info", "inverse pscore", text)]
        for name in policies:
            allowed = self.eligible.get(name)
            items = float(facts.num_items) if allowed is None else allowed.mean
            found.append(
                _inverse_mean(name, self.inverse[name], items, eligible=allowed is not None)
            )
        return found + _policies_agree(self.inverse, policies, facts) + _target_mass(self.weight)


def _all_ones(rows: int) -> Finding:
    return Finding(
        "error",
        "all propensities 1",
        f"all {rows:,} propensities are 1: a placeholder, or a policy that always shows the same "
        "item for a context",
        {"rows": rows},
        remedy="log the probability with which each item was drawn; without draws no other policy "
        "can be evaluated. A log without propensities has pscore: null in its schema",
    )


def _inverse_mean(policy: str, inverse: Moments, n_items: float, *, eligible: bool) -> Finding:
    """Compare the mean of 1/pscore with the number of items that it estimates.

    E[1/pi_0(a|x)] is the number of items with positive probability: at most N, and N where every
    item can be shown; with eligible items N is the mean of the rows' numbers. A deviation of more
    than 4 standard errors is not chance (6e-5 for a normal mean; nothing is concluded where one row
    dominates the mean).
    """
    of = f"{n_items:.4g} eligible items a row" if eligible else f"{n_items:,.0f} items"
    whose = f" of behavior policy '{policy}'" if policy else ""
    text = (
        f"mean of 1/pscore{whose} is {inverse.mean:.4g} (standard error "
        f"{inverse.std_error:.2g}); with {of} it must be at most that"
    )
    numbers = {
        "mean": inverse.mean,
        "std_error": inverse.std_error,
        "items": n_items,
        "rows": inverse.count,
    }
    name = "inverse pscore"
    slack = _ALARM * inverse.std_error + 1e-6 * n_items
    if _looks_like_percent(inverse, n_items):
        return Finding(
            "error",
            name,
            text + f": {100 * inverse.mean:.4g}, a hundred times as much, would fit. The "
            "propensities look like percent",
            numbers,
            remedy="divide the propensities by 100. If each request can really show only about "
            f"{inverse.mean:.3g} items, name them in the schema's section eligible",
        )
    if inverse.too_noisy(n_items):
        return Finding(
            "info", name, text + ": too noisy for a conclusion about the propensities", numbers
        )
    if inverse.mean > n_items + slack:
        return Finding(
            "error",
            name,
            text + ": propensities are too small (are they of one position out of several, "
            "or of a whole slate?)",
            numbers,
            remedy="state pscore_kind in the schema if they are of slates; check the catalogue, "
            "which may lack items that the policy shows",
        )
    if inverse.mean < 0.5 * n_items - slack:
        whole = "eligible items" if eligible else "catalogue"
        return Finding(
            "warning",
            name,
            text + f": the logging policy shows only a part of the {whole}, or propensities "
            "are too large",
            numbers,
            remedy="check the propensities, and that the section eligible rules out all that the "
            "policy never shows"
            if eligible
            else "if a request can show only some items, name them in the schema's section "
            "eligible",
        )
    return Finding("info", name, text + ": consistent", numbers)


def _looks_like_percent(inverse: Moments, n_items: float) -> bool:
    """Whether the mean of 1/pscore is far too small, and a hundred times as much would fit."""
    if inverse.dominated:
        return False
    slack = _ALARM * inverse.std_error
    low, high = inverse.mean - slack, inverse.mean + slack
    half = 0.5 * n_items
    return high < half and 100.0 * high >= half and 100.0 * low <= n_items


def _policies_agree(
    inverse: dict[str, Moments], policies: list[str], facts: LogFacts
) -> list[Finding]:
    """Compare the policies' means of 1/pscore, which are equal for equal sets of items."""
    if len(policies) < 2:
        return []
    name = "behavior policies"
    means = [inverse[policy] for policy in policies]
    low, high = min(means, key=lambda m: m.mean), max(means, key=lambda m: m.mean)
    error = math.hypot(low.std_error, high.std_error)
    text = (
        f"the means of 1/pscore of {len(policies)} behavior policies differ by at most "
        f"{high.mean - low.mean:.4g} (standard error {error:.2g}). The mean weight of one "
        "against another cannot be tested: a log holds only its own policy's probabilities"
    )
    numbers = {"difference": high.mean - low.mean, "std_error": error}
    if any(m.too_noisy(facts.num_items) for m in (low, high)):
        return [Finding("info", name, text + ". Too noisy for a conclusion", numbers)]
    if high.mean - low.mean > _ALARM * error + 1e-6 * high.mean:
        text += ". They can show different items, or the propensities of one are wrong"
        return [Finding("warning", name, text, numbers)]
    return [Finding("info", name, text, numbers)]


def _target_mass(weight: Moments) -> list[Finding]:
    if weight.count == 0:
        return []
    lost = 1.0 - weight.mean
    text = (
        f"mean weight of the target policy is {weight.mean:.4g} (standard error "
        f"{weight.std_error:.2g}), so {max(lost, 0.0):.1%} of its mass is on items "
        "without support in the log"
    )
    numbers = {"mean": weight.mean, "std_error": weight.std_error, "without_support": lost}
    if weight.too_noisy(1.0):
        return [Finding("info", "target", text + ": too noisy for a conclusion", numbers)]
    slack = _ALARM * weight.std_error + 1e-6
    if weight.mean > 1.0 + slack:
        return [Finding("error", "target", text + ": above 1, propensities are too small", numbers)]
    level: Level = "warning" if lost > slack else "info"
    return [Finding(level, "target", text, numbers)]


def _eligible(part: LogPart) -> dict[str, Moments]:
    sets = eligible_items(part.catalogue, part.schema)
    if sets is None:
        return {}
    count = sets.encode(part.good).count().astype(np.float64)
    return _by_policy(part.good, count, part.schema)


def _merged(one: dict[str, Moments], other: dict[str, Moments]) -> dict[str, Moments]:
    names = dict.fromkeys([*one, *other])
    return {name: one.get(name, Moments()).merge(other.get(name, Moments())) for name in names}


def _by_policy(
    table: pa.Table, values: NDArray[np.float64], schema: LogSchema
) -> dict[str, Moments]:
    """Moments of values (n,) by behavior policy, and under "" of all."""
    if not values.size:
        return {}
    found = {"": Moments.of(values)}
    if schema.behavior_policy is None:
        return found
    names = pc.dictionary_encode(
        category_values(table.column(schema.behavior_policy)).cast(pa.string())
    )
    place = names.indices.to_numpy(zero_copy_only=False)
    for number, name in enumerate(names.dictionary.to_pylist()):
        found[name] = Moments.of(values[place == number])
    return found
