"""The prior order of candidates: a later one must beat an earlier one on held-out rows."""

from __future__ import annotations

from offtower.data.encoding import FeatureEncoding
from offtower.prepare import PreparedData
from offtower.training.auto.rewarded_rows import RewardedRows

REGRESSIONS = ("regression_linear", "regression")
LIKELIHOODS = ("likelihood_linear", "likelihood")
DEEP = ("regression", "likelihood")
IMPLICIT = "implicit_linear"
CLONE = "behavior_cloning"

ENOUGH = 50
"""Rewarded rows from which an item counts as well observed."""
_WELL_OBSERVED = 0.9
"""Share of well observed items from which regressions come first."""


def prior_order(data: PreparedData, rewarded: RewardedRows) -> tuple[str, ...]:
    """Return candidate names, the preferred ones first.

    Regression uses every row, also those without reward, and is best where its model is well
    specified; the linear one has the fewest ways to overfit. For an item that the log rarely
    rewards, its prediction comes from the item's features. An id has none, so the prediction stays
    near the initial embedding, and held-out values of policies off the log are too noisy to reveal
    that. Therefore regressions come first if items have features or nearly all are well observed.

    Otherwise likelihoods and implicit squares come first. The likelihood of rewarded items,
    weighted by 1 / pscore, needs no reward model and lowers items that the log never shows;
    implicit squares do the same with a least-squares problem per id, which is better for ids at
    high rank.

    The clone of the logging policy ignores rewards and comes last.

    Towers with hidden layers are left out where items are ids and a context is one id or one bag:
    the linear ones already have weights of their own for each pair of values.
    """
    order: tuple[str, ...]
    if not ids_only(data) or _well_observed(rewarded):
        order = (*REGRESSIONS, *LIKELIHOODS, CLONE)
    else:
        order = (IMPLICIT, *LIKELIHOODS, *REGRESSIONS, CLONE)
    if (
        ids_only(data)
        and _single_value(data.context_encoding)
        and _single_value(data.item_encoding)
    ):
        return tuple(name for name in order if name not in DEEP)
    return order


def _single_value(encoding: FeatureEncoding) -> bool:
    return len(encoding.specs) == 1 and (
        encoding.specs[0].pooled or encoding.specs[0].kind == "category"
    )


def ids_only(data: PreparedData) -> bool:
    """Whether items are described by their ids alone."""
    return all(
        spec.kind == "category"
        and data.item_encoding.cardinality(spec.name) > data.items.num_items / 2
        for spec in data.item_encoding.specs
    )


def _well_observed(rewarded: RewardedRows) -> bool:
    return float((rewarded.counts >= ENOUGH).mean()) >= _WELL_OBSERVED
