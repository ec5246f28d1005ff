"""What an evaluation says about the runs: their training, catalogue, eligible items and serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offtower.data.catalogue import Catalogue
from offtower.data.unknown import UnknownValues
from offtower.evaluation.evaluator import Evaluator
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.run_loading import EvaluatedPolicy, OpenRun
from offtower.models.items import DEFAULT_CHUNK


def training_notes(evaluator: Evaluator) -> list[str]:
    """Say where a policy was trained on the evaluated log, or with another catalogue."""
    notes = []
    if evaluator.learned_from_log():
        notes.append("the policies were trained on this log: every value is optimistic")
    changed = evaluator.changed_catalogue()
    runs = [run for run in evaluator.runs if run.name in changed]
    notes += unseen_items(evaluator.catalogue, runs)
    if changed:
        notes.append(
            f"the catalogue changed since {', '.join(changed)} was trained (its fingerprint "
            "differs): items or their features are others, and the policy is evaluated with the "
            "features of today. If that is not meant, evaluate with the catalogue of the training"
        )
    return [*notes, *_eligible_notes(evaluator), *advice_notes(evaluator.runs)]


def advice_notes(runs: Sequence[OpenRun]) -> list[str]:
    """What the training of each run advised, such as to keep the logging policy."""
    said = [(run.name, run.directory.manifest().get("advice")) for run in runs]
    return [f"{name}, by its training log: {advice}" for name, advice in said if advice]


def _eligible_notes(evaluator: Evaluator) -> list[str]:
    """Say where the log's eligible items are not those of a policy's training."""
    here = evaluator.log.schema.to_dict()["eligible"]
    notes = []
    for run in evaluator.runs:
        trained = run.directory.manifest().get("eligible")
        if trained == here:
            continue
        if here is None:
            what = "and the schema of this log has none: every item counts as eligible here"
        elif trained is None:
            what = "over all items"
        else:
            what = "with another section than this log has"
        subject = (
            "without the section 'eligible'" if trained is None else "with a section 'eligible'"
        )
        notes.append(
            f"{run.name} was trained {subject}, {what}. A policy is evaluated as it is served "
            "only where the log names the items that it is served from"
        )
    return notes


def unseen_items(catalogue: Catalogue, runs: Sequence[OpenRun]) -> list[str]:
    """Items of a changed catalogue with values that the training of these runs did not see."""
    notes = []
    for run in runs:
        found, encoding = UnknownValues(), run.policy.item_encoding
        for start in range(0, catalogue.num_items, DEFAULT_CHUNK):
            stop = min(start + DEFAULT_CHUNK, catalogue.num_items)
            found.add_table(encoding, catalogue.table(start, stop))
        notes += [f"{run.name}: {sentence}" for sentence in found.sentences("items")]
    return notes


def serving_notes(policies: Mapping[str, EvaluatedPolicy], result: EvaluationResult) -> list[str]:
    """Say how policies are served, where not as trained, and what that means for estimates."""
    notes = []
    for name, one in policies.items():
        if name in result.unsupported:
            notes.append(
                f"{name} is left out: no row of the log shows what it would show, so that the log "
                "says nothing about its value"
            )
        elif one.serving.mode == "top_k":
            weights = result.policies[name].weights
            matching = round((1.0 - weights.zero_share) * weights.n)
            shows = "its best item" if one.serving.k == 1 else f"its {one.serving.k} best items"
            notes.append(
                f"{name} always shows {shows}: only the {matching:,} of "
                f"{weights.n:,} rows that logged the very item it would show at their position say "
                "anything about it. A log of its own would support no other policy"
            )
        elif one.also is None:
            if not one.serving.is_trained_policy:
                notes.append(f"{name} is served, and evaluated, with {one.serving.text}")
            k, positions = one.serving.k, len(result.policies[name].positions)
            if k < positions:
                notes.append(
                    f"{name} shows {k} item{'' if k == 1 else 's'} a round, and this "
                    f"log has up to {positions}: its value is that of rounds as long as the log's"
                )
    return notes
