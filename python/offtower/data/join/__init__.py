"""Joins of decisions with their outcomes, in bounded memory.

Both sides are cut into partitions by a hash of the key and written to temporary files; a partition
is joined in memory (a Grace hash join). Decisions are then read a second time, in their order, and
take their rewards from a file of one number a row.
"""

from offtower.data.join.plan import Duplicates, JoinCounts, JoinedReward, JoinPlan, Rule
from offtower.data.join.tables import Joined, join_outcomes, join_tables

__all__ = [
    "Duplicates",
    "JoinCounts",
    "JoinPlan",
    "Joined",
    "JoinedReward",
    "Rule",
    "join_outcomes",
    "join_tables",
]
