"""Draw docs/images/architecture.svg: `python docs/images/architecture.py`."""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1000, 698
INK, LINE, PAPER = "#1f2933", "#7b8794", "#ffffff"
DATA, CODE, NATIVE = "#e8eef5", "#dcebdd", "#fbe9d3"


def box(x: float, y: float, w: float, h: float, title: str, text: str, fill: str) -> str:
    lines = [
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{LINE}"/>',
        f'<text x="{x + w / 2}" y="{y + 22}" class="t">{escape(title)}</text>',
    ]
    for number, line in enumerate(text.split("\n") if text else []):
        place = f'x="{x + w / 2}" y="{y + 40 + 15 * number}"'
        lines.append(f'<text {place} class="s">{escape(line)}</text>')
    return "\n".join(lines)


def arrow(x1: float, y1: float, x2: float, y2: float, label: str = "") -> str:
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" marker-end="url(#a)"/>'
    if not label:
        return line
    place = f'x="{(x1 + x2) / 2}" y="{(y1 + y2) / 2 - 6}"'
    return f'{line}\n<text {place} class="l">{escape(label)}</text>'


def main() -> None:
    parts = [
        # The data's way.
        box(20, 40, 130, 70, "log files", "CSV, JSON, Parquet\nany store", DATA),
        arrow(150, 75, 220, 75, "ingest"),
        box(220, 40, 150, 70, "logs/  catalogue/", "checked Parquet\nmanifest, digests", DATA),
        arrow(370, 75, 430, 75, "train"),
        box(430, 40, 150, 70, "runs/<name>/", "checkpoints/  policy/\nmetrics.jsonl", DATA),
        arrow(580, 75, 650, 75, "evaluate"),
        box(650, 40, 150, 70, "report", "value, interval,\nverdict", DATA),
        arrow(505, 110, 505, 160),
        '<text x="530" y="140" class="l">export</text>',
        box(430, 160, 150, 56, "export/", "vectors, index, towers", DATA),
        arrow(580, 188, 650, 188, "search"),
        box(650, 160, 150, 56, "served items", "with propensities", DATA),
        f'<path d="M 725 216 V 240 H 85 V 110" fill="none" stroke="{INK}" marker-end="url(#a)"/>',
        '<text x="400" y="234" class="l">tomorrow\'s log, once outcomes are joined</text>',
        # The packages: a package imports only from rows below its own.
        '<text x="20" y="282" class="h">Packages: each imports only from rows below</text>',
        box(20, 296, 310, 36, "cli", "", CODE),
        box(345, 296, 310, 36, "learner", "", CODE),
        box(670, 296, 310, 36, "benchmarks, quickstart, selftest", "", CODE),
        box(20, 340, 960, 36, "jobs  (the same work on Ray)", "", CODE),
        box(20, 384, 635, 36, "training", "", CODE),
        box(670, 384, 310, 36, "experiment", "", CODE),
        box(20, 428, 470, 36, "evaluation", "", CODE),
        box(510, 428, 470, 36, "retrieval", "", CODE),
        box(20, 472, 470, 36, "serving", "", CODE),
        box(510, 472, 470, 36, "prepare, crossfit", "", CODE),
        box(20, 516, 310, 36, "models", "", CODE),
        box(345, 516, 310, 36, "objectives", "", CODE),
        box(670, 516, 310, 36, "sampling", "", CODE),
        box(20, 560, 960, 36, "slates", "", CODE),
        box(20, 604, 310, 36, "data", "", CODE),
        box(345, 604, 310, 36, "ops", "", CODE),
        box(670, 604, 310, 36, "config, files, errors", "", CODE),
        box(345, 648, 310, 36, "csrc: C++ and CUDA, torch-free", "", NATIVE),
    ]
    style = (
        f"text{{font-family:sans-serif;fill:{INK};text-anchor:middle}}"
        ".t{font-size:14px;font-weight:600}.s{font-size:12px}"
        ".l{font-size:12px;font-style:italic}.h{font-size:14px;text-anchor:start}"
    )
    marker = (
        '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker>'
    )
    body = "\n".join(parts)
    Path(__file__).with_suffix(".svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="The data flow and the packages of offtower">\n'
        f"<style>{style}</style><defs>{marker}</defs>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>\n{body}\n</svg>\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
