"""What looks wrong in a log: one check for each kind, from mergeable sums in bounded memory."""

from offtower.data.findings.base import Check, Finding, Level, LogFacts, LogPart, Target
from offtower.data.findings.coverage import ConstantColumns, Coverage
from offtower.data.findings.eligible import ExcludedItems
from offtower.data.findings.histories import Histories
from offtower.data.findings.propensities import Propensities
from offtower.data.findings.reward import MeanReward
from offtower.data.findings.rows import BadRows, DoubledRows, RepeatedRounds
from offtower.data.findings.sentinels import EpochTimes, NumericSentinels, TextSentinels
from offtower.data.findings.texts import Spellings
from offtower.data.findings.times import TimeUnits

CHECKS: tuple[type[Check], ...] = (
    BadRows,
    MeanReward,
    Propensities,
    ExcludedItems,
    Histories,
    Coverage,
    ConstantColumns,
    RepeatedRounds,
    DoubledRows,
    NumericSentinels,
    TextSentinels,
    EpochTimes,
    TimeUnits,
    Spellings,
)
"""In the order of the report."""

__all__ = ["CHECKS", "Check", "Finding", "Level", "LogFacts", "LogPart", "Target"]
