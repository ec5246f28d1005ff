"""Join logged decisions with their outcomes, for ingest.

DECISIONS and OUTCOMES are files or folders. A decision without an outcome keeps a null reward,
which is pending, never 0: the section outcomes of the schema says when it is final. Memory is
bounded. The schema beside DECISIONS (day.schema.yaml beside day.parquet) is used and written beside
the result.

\b
Example:
  offtower join served/day.parquet clicks.csv --rule any --out joined.parquet
  offtower join served orders.parquet --schema schema.yaml --key order=order_id \\
    --reward revenue=amount --rule sum --time paid_at --window 7d --out joined.parquet
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from offtower.cli.common import AsJson, escape, messages, print_json, verb
from offtower.errors import ConfigError

if TYPE_CHECKING:
    from offtower.data.join import JoinedReward, Rule
    from offtower.data.schema import LogSchema

_RULES = ("sum", "max", "first", "any")


@verb
def join(
    decisions: Annotated[str, typer.Argument(help="Log of what was shown.")],
    outcomes: Annotated[str, typer.Argument(help="What came of it.")],
    out: Annotated[str, typer.Option(help="New Parquet file.")],
    schema: Annotated[
        Path | None, typer.Option(help="Schema of the log; by default the one beside DECISIONS.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated columns that name a decision, as NAME or DECISIONS=OUTCOMES; by "
            "default the schema's round and position."
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="Reward to add, as NAME or NAME=COLUMN of the outcomes; may be repeated; by "
            "default the schema's."
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="How several outcomes of a decision become one reward, as RULE or REWARD=RULE: "
            "sum, max, first, any (1 if any is not 0, or if there is any where OUTCOMES has no "
            "such column). By default several are refused."
        ),
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time column of the outcomes.")] = None,
    decided: Annotated[
        str | None, typer.Option(help="Time column of the decisions; by default the schema's.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Ignore outcomes later than this after the decision, such as 7d."),
    ] = None,
    missing: Annotated[
        str, typer.Option(help="Reward of older decisions without one: a number, or error.")
    ] = "error",
    duplicates: Annotated[
        Literal["error", "drop", "keep"],
        typer.Option(help="Outcomes that equal an earlier one in every column."),
    ] = "error",
    as_json: AsJson = False,
) -> None:
    from offtower.cli.ingest import read_schemas
    from offtower.data.join import JoinPlan
    from offtower.data.join.files import (
        join_files,
        outcomes_section,
        schema_beside,
        write_schema,
    )

    beside = schema_beside(decisions)
    log, catalogue, formats = None, None, None
    if schema is not None:
        log, catalogue, formats = read_schemas(schema)
    elif beside.local is not None and beside.exists():
        log, catalogue, formats = read_schemas(beside.local)
    if window is not None and time is None:
        raise ConfigError("--window needs --time, the time column of the outcomes")
    span = _number(window)
    plan = JoinPlan(
        _keys(key, log),
        _rewards(reward, rule or [], log),
        decided or (None if log is None else log.timestamp),
        time,
        span,
        duplicates,
    )
    wanted = _number(missing)
    if isinstance(wanted, str) and wanted != "error":
        raise ConfigError(f"--missing must be a number or error, got '{missing}'")
    if wanted != "error" and window is None:
        raise ConfigError(
            "--missing needs --window and --time: only a window says when a decision without an "
            "outcome is final. Where all outcomes are there, leave it out and write 'outcomes: "
            f"{{maturity: 0s, missing: {missing}}}' in the section log of the schema"
        )
    counts = join_files(decisions, outcomes, out, plan, formats)
    place = None
    if log is not None:
        section = outcomes_section(
            plan, 0.0 if wanted is None else wanted, counts, not isinstance(span, str)
        )
        place = write_schema(out, log, catalogue, section)
    if as_json:
        print_json(
            {**counts.to_dict(), "out": out, "schema": None if place is None else str(place)}
        )
        return
    console = messages()
    console.print(
        f"{counts.decisions:,} decisions, {counts.outcomes:,} outcomes: {counts.rewarded:,} "
        f"decisions have an outcome, {counts.several:,} of them several; "
        f"{counts.decisions - counts.rewarded:,} have none (null, pending)"
    )
    console.print(
        f"{counts.unmatched:,} outcomes belong to no decision, {counts.early:,} came before their "
        f"decision, {counts.late:,} after the window, {counts.duplicates:,} are duplicates"
    )
    with_schema = "" if place is None else f" with the schema {place}"
    console.print(escape(f"joined log in {out}; ingest it{with_schema}"), soft_wrap=True)


def _keys(text: str | None, log: LogSchema | None) -> tuple[tuple[str, str], ...]:
    if text is None:
        if log is None or log.round_id is None:
            raise ConfigError(
                "--key is needed: the columns that name a decision, such as request_id, or "
                "DECISIONS=OUTCOMES where their names differ (there is no schema with a round_id)"
            )
        names = [name for name in (log.round_id, log.position) if name is not None]
        return tuple((name, name) for name in names)
    pairs = [part.partition("=") for part in text.split(",")]
    return tuple((one.strip(), (other or one).strip()) for one, _, other in pairs)


def _rewards(
    given: list[str] | None, rules: list[str], log: LogSchema | None
) -> tuple[JoinedReward, ...]:
    from offtower.data.join import JoinedReward

    if not given:
        if log is None:
            raise ConfigError("--reward is needed: the column of the outcomes with the reward")
        given = list(log.reward_columns)
    pairs = [text.partition("=") for text in given]
    names = [name for name, _, _ in pairs]
    by_name: dict[str, Rule] = {}
    for text in sorted(rules, key=lambda text: "=" in text):  # Those of one reward last.
        name, _, rule = text.rpartition("=")
        if rule not in _RULES or (name and name not in names):
            raise ConfigError(
                f"--rule '{text}' must be one of {', '.join(_RULES)}, or REWARD=RULE with a reward "
                f"of {', '.join(names)}"
            )
        by_name.update(dict.fromkeys([name] if name else names, cast("Rule", rule)))
    return tuple(JoinedReward(name, column or None, by_name.get(name)) for name, _, column in pairs)


def _number(text: str | None) -> str | float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
