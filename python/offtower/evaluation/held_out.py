"""Whether a log is held out: which policies were learned from its rows, or chosen on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from offtower.config import settings_fingerprint
from offtower.data.content import LogContent, is_same
from offtower.data.ledger import LedgerEntry
from offtower.data.location import AnyPath
from offtower.data.log import ParquetLog
from offtower.data.row_sketch import RowSketch, sketched_columns
from offtower.evaluation.run_loading import EvaluatedPolicy, OpenRun
from offtower.execution import Execution
from offtower.mapping import merge_all, pieces
from offtower.prepare import trained_rows

_PARTS = {
    "train": "it was trained on",
    "validation": "its epoch was chosen on",
    "ancestors": "a policy that it started from was trained on",
}
_EVENTS = {
    "trained": _PARTS["train"],
    "validated": _PARTS["validation"],
    "served": "its serving was chosen on",
}
_PART_GROUPS = 64
"""Row groups that are compared at a time."""


def not_held_out(
    policies: Mapping[str, EvaluatedPolicy],
    log: LogContent,
    entries: Sequence[LedgerEntry],
    place: AnyPath,
) -> dict[str, str]:
    """By policy, what part the log had in learning or choosing it; none for a held-out log.

    Args:
        log: content of the evaluated log. place: where it is.
        entries: of its ledger.
    """
    found = {}
    for name, one in policies.items():
        part = _part(one.run, log, entries)
        if part is not None:
            found[name] = (
                f"{part}, so that its value here is too high and no 'go' would mean anything. "
                f"Decide on rows that had no part in it: {_fresh_log(one.run, place)}"
            )
    return found


def with_copied_rows(
    withheld: Mapping[str, str],
    policies: Mapping[str, EvaluatedPolicy],
    log: ParquetLog,
    place: AnyPath,
    execution: Execution,
) -> dict[str, str]:
    """`withheld` with the policies whose training log holds rows of this log in other files.

    Reads the log once, unless every policy is withheld already. Rows are compared by their content
    (`data.row_sketch`).
    """
    found, sketch = dict(withheld), None
    for name, one in policies.items():
        trained = None if name in found else trained_rows(one.run.directory.path)
        if trained is None:
            continue
        if sketch is None:
            sketch = _sketch(log, execution)
        shared = sketch.shared(trained)
        if shared is not None:
            found[name] = (
                f"it was trained on {shared.text}, in other files: its value here is too high and "
                "no 'go' would mean anything. Decide on rows that had no part in it: "
                f"{_fresh_log(one.run, place)}. If these are other rows that only look alike, name "
                "the logs' timestamp in their schema"
            )
    return found


def _sketch(log: ParquetLog, execution: Execution) -> RowSketch:
    """The sketch of a log; its row groups are read wherever the mapper runs."""
    mapper, progress = execution.mapper, execution.progress
    groups = pieces(len(log.row_group_sizes), _PART_GROUPS, mapper.workers)
    progress.start("comparing the rows with training logs", log.num_rows)

    def reported() -> Iterator[RowSketch]:
        parts = mapper.map(partial(_sketch_groups, log), groups, "comparing rows")
        for part, sketch in zip(groups, parts, strict=True):
            progress.advance(int(log.row_group_sizes[part.start : part.stop].sum()))
            yield sketch

    found = merge_all(reported())
    progress.finish()
    return found


def _sketch_groups(log: ParquetLog, groups: range) -> RowSketch:
    return RowSketch.of(log.read_row_groups(groups, sketched_columns(log.schema)), log.schema)


def _part(run: OpenRun, log: LogContent, entries: Sequence[LedgerEntry]) -> str | None:
    manifest = run.directory.manifest()
    of_run: Mapping[str, Any] = manifest.get("data_files", {})
    for part, what in _PARTS.items():
        shared = log.shared_files(of_run.get(part, ()))
        if shared:
            share = "" if shared == len(log.files) else f"{shared} of {len(log.files)} files of "
            return f"{what} {share}this log"
    if any(is_same(one, log.fingerprint) for one in manifest.get("serving_tuned_on", ())):
        return f"{_EVENTS['served']} this log"
    settings = settings_fingerprint(run.config)
    for entry in entries:
        if entry.kind in _EVENTS and entry.facts["policy"] == run.policy_digest:
            return f"{_EVENTS[entry.kind]} this log"
        if entry.kind == "tuned" and settings in entry.facts["settings"]:
            return "'offtower tune' chose its settings on this log"
    return None


def _fresh_log(run: OpenRun, place: AnyPath) -> str:
    test = run.config.data.test
    if test is not None and Path(test).absolute() != Path(str(place)).absolute():
        return f"the run's data.test '{test}'"
    return "a part that 'offtower ingest --split' kept apart, or rows that were logged later"
