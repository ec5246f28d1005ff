"""Whether a log is held out: which policies were learned from its rows, or chosen on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offtower.config import settings_fingerprint
from offtower.data.content import LogContent, is_same
from offtower.data.ledger import LedgerEntry
from offtower.data.location import AnyPath
from offtower.data.row_sketch import RowSketch
from offtower.evaluation.run_loading import EvaluatedPolicy, OpenRun
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
    rows: RowSketch,
    place: AnyPath,
) -> dict[str, str]:
    """`withheld` with the policies that were learned from rows of this log in other files, or whose
    epoch was chosen on them.

    Args:
        rows: of the log, compared by their content.
    """
    found = dict(withheld)
    for name, one in policies.items():
        part = None if name in found else _copies(one.run, rows)
        if part is not None:
            found[name] = (
                f"{part}, in other files: its value here is too high and no 'go' would mean "
                f"anything. Decide on rows that had no part in it: {_fresh_log(one.run, place)}. "
                "If these are other rows that only look alike, name the logs' timestamp in their "
                "schema"
            )
    return found


def _copies(run: OpenRun, rows: RowSketch) -> str | None:
    """What part copies of these rows had in a run; None without any."""
    manifest = run.directory.manifest()
    sketches = {
        "train": trained_rows(run.directory.path),
        "validation": RowSketch.from_dict(manifest.get("validation_rows")),
        "ancestors": RowSketch.from_dict(manifest.get("ancestor_rows")),
    }
    for part, sketch in sketches.items():
        shared = None if sketch is None else rows.shared(sketch)
        if shared is not None:
            return f"{_PARTS[part]} {shared.text}"
    return None


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
