"""List what a log was used for: trainings, choices, evaluations and their verdicts.

Exit code 0: listed. 2: the log or its ledger cannot be read.

\b
Example:
  offtower log history logs/mine/test
"""

from __future__ import annotations

from typing import Annotated

import typer

from offtower.cli.common import AsJson, escape, messages, print_json, verb


@verb
def log_history(
    log: Annotated[str, typer.Argument(help="Directory of the log, or its address (s3://...).")],
    as_json: AsJson = False,
) -> None:
    from offtower.data.content import log_content
    from offtower.data.ledger import LogLedger
    from offtower.evaluation.looks import describe_entries

    content = log_content(log).fingerprint
    entries = LogLedger(log).entries(content)
    if as_json:
        print_json({"log": log, "content": content, "entries": [e.to_dict() for e in entries]})
        return
    if not entries:
        messages().print("no use of this log is on record")
    for line in describe_entries(entries):
        messages().print(escape(line), soft_wrap=True)
