"""What a user should know about an ingested log."""

from __future__ import annotations

from offtower.data.schema import CatalogueSchema, FeatureSpec
from offtower.data.source import UnitTally
from offtower.errors import DataError

NO_PROPENSITIES = (
    "the log has no propensities (no column pscore): policies can be learned from it by regression "
    "and likelihood, but whether one is better than today's rests on estimates; "
    "docs/how-to/without-propensities.md says what can be done"
)


def catalogue_notes(schema: CatalogueSchema) -> list[str]:
    if not schema.features:
        return [
            "the catalogue has no features, so that no policy can be trained on it: name some in "
            "the schema's section catalogue and pass --catalogue; if the items have only ids, name "
            f"these: features: [{{name: {schema.item_id}, kind: category}}]"
        ]
    if schema.features != (FeatureSpec(name="item_id", kind="category"),):
        return []
    return [
        "the catalogue has no features besides the ids: the item tower learns each item alone, and "
        "nothing about items that the log does not show. If the items have features, name them in "
        "the schema's section catalogue and pass --catalogue"
    ]


def quarantine_notes(found: UnitTally, moved_mean: str) -> list[str]:
    effect = found.effect
    if not effect.moves_mean:
        return []
    text = (
        f"the quarantine moves the mean reward from {effect.every.mean:.5g} (all "
        f"{effect.every.count:,} rows with a reward) to {effect.good.mean:.5g} "
        f"({effect.good.count:,} good rows)"
    )
    if moved_mean == "accept":
        return [text]
    raise DataError(
        f"{text}. Rewards from {effect.every.smallest:g} to {effect.every.largest:g} were read: if "
        "they are right, state reward_range in the schema; if the bad rows are to be left out all "
        "the same, confirm it with --accept-moved-mean"
    )
