"""docs/reference/cluster.md: its table is computed, its commands and files exist."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.cluster.test_manifests import ROOT, parse

sys.path.insert(0, str(ROOT / "benchmarks"))
from cluster_sizing import LogSizes, Sizes, markdown, readings, table, times

DOCS = (ROOT / "docs" / "reference" / "cluster.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text"), [("table", markdown(table())), ("times", times()), ("readings", readings())]
)
def test_the_tables_are_what_the_script_computes(name: str, text: str) -> None:
    inside = DOCS.split(f"<!-- {name} of benchmarks/cluster_sizing.py -->\n")[1]
    assert inside.split(f"\n<!-- end of {name} -->")[0] == text


def test_traffic_and_memory_depend_on_items_as_stated() -> None:
    """Traffic of item_sharded does not depend on N; its memory falls with R; a log is read once."""
    few, many = Sizes(10**6, workers=8), Sizes(10**8, workers=8)
    assert few.traffic("item_sharded") == many.traffic("item_sharded")
    assert few.traffic("replicated") < many.traffic("replicated")
    assert Sizes(10**7, workers=1).traffic("item_sharded") == 0.0
    one, two = Sizes(10**8, workers=1), Sizes(10**8, workers=2)
    assert one.memory("item_sharded") == one.memory("replicated") == two.memory("replicated")
    assert two.memory("item_sharded") > 0.5 * one.memory("item_sharded")
    log = LogSizes(10**6)
    assert all(workers * log.read(workers) == log.read(1) for workers in (2, 4, 8))
    assert log.sent(1) == 0.0 and log.sent(8) < log.rows * (log.shared + log.context)


def commands() -> list[list[str]]:
    """The page's commands for offtower and cluster/submit.sh."""
    found = []
    text = DOCS.replace("\\\n", " ")
    for line in re.findall(r"(?m)^\s*(offtower .*|cluster/submit\.sh .*)$", text):
        found.append(["offtower", *shlex.split(line, comments=True)[1:]])
    return found


def test_commands_of_the_page_parse() -> None:
    assert len(commands()) >= 6
    for command in commands():
        parse(command)


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:cluster|tests|benchmarks)/[\w./-]+)", DOCS)))
)
def test_files_of_the_page_exist(name: str) -> None:
    assert Path(ROOT / name).exists()
