"""Findings of a validation in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from offtower.cli.common import escape, messages

if TYPE_CHECKING:
    from offtower.data.findings import Finding

_COLORS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def print_findings(findings: Iterable[Finding]) -> None:
    """Print each finding with its examples and its remedy."""
    console = messages()
    for finding in findings:
        color = _COLORS[finding.level]
        console.print(f"[{color}]{finding.level:>7}[/]  {escape(finding.message)}")
        if finding.examples:
            console.print(f"         for example {escape(', '.join(finding.examples))}")
        if finding.remedy:
            console.print(f"         [dim]{escape(finding.remedy)}[/]")
