"""Looks at a log: the error that each evaluation may spend, given the earlier ones.

A log that is evaluated on again and again ends in a false "go". The alpha of a log, 1 - confidence,
is therefore spent once. Its j-th evaluation gets the share

    s_1 = 1/2,    s_j = 1 / (2 j (j - 1))  for j > 1,    s_1 + ... + s_j = 1 - 1 / (2 j) < 1

as the probability of a false "go" among its policies, which share it equally (Bonferroni). The
first evaluation has its usual two-sided interval at the stated confidence, of which one side is an
error of alpha / 2; the later ones share the other half. Earlier verdicts stand: no share changes.
Source: alpha spending, Lan and DeMets 1983 ("Discrete sequential boundaries for clinical trials");
over an open number of hypotheses, Foster and Stine 2008 ("alpha-investing").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offtower.config import EvaluationConfig
from offtower.data.catalogue import Catalogue
from offtower.data.content import LogContent, is_same
from offtower.data.ledger import Ledger, LedgerEntry
from offtower.data.log import Log
from offtower.errors import DataError
from offtower.evaluation.decision.gate import withhold
from offtower.evaluation.intervals.methods import simultaneous_confidence
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.result import EvaluationResult


def share(look: int) -> float:
    """Part of a log's alpha that its evaluation number `look` (from 1) spends."""
    return 0.5 if look == 1 else 0.5 / (look * (look - 1.0))


def shares_left(look: int) -> float:
    """Part of a log's alpha that is left after `look` evaluations."""
    return 0.5 / look if look else 1.0


@dataclass(frozen=True)
class Question:
    """A declared question: its evaluations have an alpha of their own.

    Attributes:
        why, when: as declared; empty for the first question of a log, which nobody declares.
        uncounted: evaluations of earlier questions, which this one does not correct for.
    """

    why: str = ""
    when: str = ""
    uncounted: int = 0


@dataclass(frozen=True)
class Looks:
    """What an evaluation is among the looks at its log.

    Attributes:
        look: number among the evaluations that spend error, from 1; 0 where this one spends none,
            since every policy of it is withheld.
        policies: different policies and ways to evaluate them so far.
        repeated: all of its policies were evaluated in this way before; it spends nothing.
        error: of a false "go" on one of its policies, the least.
        spent, left: of the alpha of the question, with this evaluation.
        alpha: 1 - confidence.
        question: that it belongs to.
        unrecorded: why the ledger could not be read or written; None where it was.
    """

    look: int
    policies: int
    repeated: bool
    error: float
    spent: float
    left: float
    alpha: float
    question: Question
    unrecorded: str | None = None
    before_change: int = 0
    """Looks among the earlier ones that were at the log before files were added or removed."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "look": self.look,
            "policies": self.policies,
            "error": self.error,
            "spent": self.spent,
            "left": self.left,
            "alpha": self.alpha,
            "question": {
                "why": self.question.why or None,
                "declared": self.question.when or None,
                "earlier_looks_not_counted": self.question.uncounted,
            },
            "unrecorded": self.unrecorded,
            "looks_before_change": self.before_change,
        }

    @property
    def sentence(self) -> str:
        """One line for people; the same where an evaluation is repeated."""
        if not self.look:
            text = "no look at this log: it had a part in learning or choosing every policy"
        else:
            text = (
                f"look {self.look} at this log; a false go has probability at most "
                f"{self.error:.2g} for each policy here, and {self.alpha:.4g} over all looks "
                f"({self.spent:.4g} of that is spent)"
            )
        if self.look and self.before_change:
            text += (
                f". {self.before_change} of the earlier looks were at this log before files were "
                "added or removed; at least half of its files were among those"
            )
        if self.question.why:
            text += (
                f". A new question was declared on {self.question.when}: "
                f"'{self.question.why}'; {self.question.uncounted} earlier look"
                f"{'' if self.question.uncounted == 1 else 's'} at this log do not count in it"
            )
        return text

    @property
    def notes(self) -> list[str]:
        if self.unrecorded is None:
            return []
        return [
            f"this look could not be recorded in the log's ledger ({self.unrecorded}): evaluations "
            "to come will not count it, so that a false go over all looks is more likely than "
            "stated. Make the log's folder writable, or evaluate a copy of it"
        ]


@dataclass(frozen=True)
class LookPlan:
    """How an evaluation decides, given the earlier looks.

    Attributes:
        confidences: by policy, of the two-sided interval of its verdict.
        withheld: by policy, why it gets no "go"; empty for most.
        looks: for the report.
        number: of its entry in the ledger; None where it made none.
    """

    confidences: Mapping[str, float]
    withheld: Mapping[str, str]
    looks: Looks
    number: int | None

    def decided(self, result: EvaluationResult) -> EvaluationResult:
        """The result with its looks and without the verdicts that are withheld."""
        policies = {
            name: replace(one, verdict=withhold(one.verdict, self.withheld[name]))
            if name in self.withheld
            else one
            for name, one in result.policies.items()
        }
        return replace(result, policies=policies, looks=self.looks)


@dataclass(frozen=True)
class LookRequest:
    """An evaluation that is about to begin.

    Attributes:
        log: identity of the log's content.
        policies: by name, identity of the policy, of how it is served and of how it is evaluated.
        confidence: stated.
        withheld: by policy, why it gets no "go".
        fresh: declares a new question, and says why; None continues the latest.
        content: files of the log, by which looks at it before a change of its files are found.
    """

    log: str
    policies: Mapping[str, str]
    confidence: float
    withheld: Mapping[str, str]
    fresh: str | None = None
    content: LogContent | None = None


@dataclass(frozen=True)
class CountedLook:
    """A look with the ledger that counts it."""

    ledger: Ledger
    request: LookRequest

    def plan(self) -> LookPlan:
        """As `plan_look`."""
        return plan_look(self.ledger, self.request)

    def finish(self, plan: LookPlan, result: EvaluationResult) -> EvaluationResult:
        """The result as it may be reported, with its verdicts on record."""
        result = plan.decided(result)
        record_verdicts(self.ledger, self.request, plan, result)
        return result


def plan_look(ledger: Ledger, request: LookRequest) -> LookPlan:
    """Count the earlier looks, and record this one before its result is known.

    An evaluation of the same policies in the same way is no new look, whatever became of the first:
    it gets the error of that one. Where the ledger cannot be written, the looks that are known
    count.

    Raises:
        DataError: the ledger is damaged.
    """
    log = request.log
    also = () if request.content is None else ledger.earlier_contents(request.content)
    planned: list[LookPlan] = []

    def evaluated(entries: tuple[LedgerEntry, ...]) -> dict[str, Any] | None:
        plan, facts = _planned(entries, request)
        planned[:] = [plan]
        return facts

    def declared(entries: tuple[LedgerEntry, ...]) -> dict[str, Any] | None:
        question, _ = _latest(entries)
        return None if question.why == request.fresh else {"why": request.fresh}

    known = ledger.entries(log, *also)
    try:
        if request.fresh is not None:
            ledger.append(log, "question", declared, also)
        entry = ledger.append(log, "evaluated", evaluated, also)
    except (DataError, OSError) as error:
        plan, _ = _planned(known, request)
        return replace(plan, looks=replace(plan.looks, unrecorded=str(error)))
    return replace(planned[0], number=None if entry is None else entry.number)


def record_verdicts(
    ledger: Ledger, request: LookRequest, plan: LookPlan, result: EvaluationResult
) -> None:
    """Append the verdicts of an evaluation; where that fails the look is recorded all the same."""
    if plan.number is None:
        return
    facts = {
        "evaluation": plan.number,
        "verdicts": {name: one.verdict.decision for name, one in result.policies.items()},
    }
    try:
        ledger.append(request.log, "verdict", lambda entries: facts)
    except (DataError, OSError):
        return


def evaluation_identity(
    options: EvaluationOptions, config: EvaluationConfig, log: Log, catalogue: Catalogue
) -> str:
    """Of all that a verdict depends on besides the policy and the rows."""
    decider, interval = options.estimators[options.decider], options.intervals[0]
    deciding = replace(
        options,
        estimators=(decider,),
        decide_by="auto",
        intervals=(interval,),
        replicates=options.replicates if interval == "bootstrap" else None,
        reward_names=(),
    )
    model = (config.reward_model, config.expected_reward, config.draws)
    return identity(
        repr(deciding),
        repr(model) if decider.needs_reward_model else "",
        config.clusters if decider.name == "mips" else None,
        repr(replace(log.schema, context=())),
        catalogue.fingerprint,
    )


def describe_entries(entries: Sequence[LedgerEntry]) -> list[str]:
    """A line for each entry of a log, oldest first; verdicts stand with their evaluations."""
    verdicts = {
        entry.facts["evaluation"]: entry.facts["verdicts"]
        for entry in entries
        if entry.kind == "verdict"
    }
    described = ((entry, _described(entry, verdicts)) for entry in entries)
    return [f"{entry.when[:19]}  {text}" for entry, text in described if text]


def _described(entry: LedgerEntry, verdicts: Mapping[int, Mapping[str, str]]) -> str:
    facts = entry.facts
    if entry.kind == "trained":
        return f"{facts['run']} was trained on it"
    if entry.kind == "validated":
        return f"the epoch of {facts['run']} was chosen on it"
    if entry.kind == "served":
        return f"ways to serve {facts['run']} were compared on it"
    if entry.kind == "tuned":
        return f"{facts['search']} compared {len(facts['settings'])} settings on it"
    if entry.kind == "question":
        return f"a new question was declared: {facts['why']}"
    if entry.kind != "evaluated":
        return ""
    of_policy = verdicts.get(entry.number, {})
    listed = ", ".join(
        f"{name}: {of_policy.get(name, 'no verdict on record')}" for name in facts["keys"]
    )
    look = f"look {facts['look']}, error {facts['error']:.2g}" if facts["spends"] else "no look"
    return f"{look}: {listed}"


def identity(*parts: Any) -> str:
    """Digest of values that JSON can represent, or whose text says what they are."""
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _latest(entries: Sequence[LedgerEntry]) -> tuple[Question, list[LedgerEntry]]:
    """The latest question, and its evaluations."""
    question, current, spending = Question(), list[LedgerEntry](), 0
    for entry in entries:
        if entry.kind == "evaluated":
            current.append(entry)
            spending += entry.facts["spends"]
        elif entry.kind == "question":
            question = Question(entry.facts["why"], entry.when[:10], spending)
            current = []
    return question, current


def _planned(
    entries: tuple[LedgerEntry, ...], request: LookRequest
) -> tuple[LookPlan, dict[str, Any] | None]:
    """The plan, and the facts of its entry; None where it repeats earlier ones."""
    question, current = _latest(entries)
    if request.fresh is not None and question.why != request.fresh:  # could not be recorded
        spending = [entry for entry in entries if entry.kind == "evaluated"]
        question = Question(request.fresh, "", sum(entry.facts["spends"] for entry in spending))
        current = []
    # A verdict of an earlier question stands too, unless this one was declared now.
    known = [entry for entry in entries if entry.kind == "evaluated"]
    known = known if request.fresh is None else current
    known = [entry for entry in known if is_same(entry.log, request.log)]
    before = {key: entry for entry in known for key in entry.facts["keys"].values()}
    alpha = 1.0 - request.confidence
    confidences: dict[str, float] = {}
    for name, key in request.policies.items():
        if key in before:
            facts = before[key].facts
            own = next(policy for policy, value in facts["keys"].items() if value == key)
            confidences[name] = facts["confidences"][own]
    new = [name for name in request.policies if name not in confidences]
    spends = any(name not in request.withheld for name in new)
    count = sum(entry.facts["spends"] for entry in current)
    look = count + spends
    level = 1.0 - 2.0 * share(look) * alpha / len(new) if spends else 0.0
    if new and not spends:
        level = simultaneous_confidence(request.confidence, len(new))
    confidences |= dict.fromkeys(new, level)
    at = look
    if not spends:
        numbers = [before[key].facts["look"] for key in request.policies.values() if key in before]
        at = max(numbers, default=0)
    keys = {key for entry in current for key in entry.facts["keys"].values()}
    left = shares_left(look) * alpha
    looks = Looks(
        look=at,
        policies=len(keys | set(request.policies.values())),
        repeated=not new,
        error=0.5 * (1.0 - max(confidences.values())),
        spent=alpha - left,
        left=left,
        alpha=alpha,
        question=question,
        before_change=sum(
            entry.facts["spends"] for entry in current if not is_same(entry.log, request.log)
        ),
    )
    ordered = {name: confidences[name] for name in request.policies}
    plan = LookPlan(ordered, request.withheld, looks, None)
    if not new:
        return plan, None
    listed = any("files" in entry.facts and is_same(entry.log, request.log) for entry in entries)
    files = {} if request.content is None or listed else {"files": list(request.content.files)}
    return plan, {
        **files,
        "keys": dict(request.policies),
        "confidences": ordered,
        "withheld": dict(request.withheld),
        "spends": spends,
        "look": at if spends else 0,
        "error": 0.5 * (1.0 - level) if spends else 0.0,
    }
