"""A life as one HTML file that needs nothing else: tables, and plots as SVG within it. What is shown is collected in `report.py`."""

import dataclasses
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.35; background: #f6f6f6; padding: .8rem; }
code { font-size: .9em; } figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; max-width: 46rem; }
figcaption, .note { color: #555; font-size: .875rem; } .yes { color: #00664f; font-weight: 600; } .no { color: #a8320a; font-weight: 600; }
@media print {
body { max-width: none; padding: 0; font-size: 10pt; } h2, figure, table { break-inside: avoid; } pre, .wide { overflow: visible; }
pre { white-space: pre-wrap; } }
"""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, told apart by those who see few colours, too"""


@dataclasses.dataclass(frozen=True)
class Version:
    """A model of the life, as its card tells."""

    hash: str
    name: str
    made: str
    """what was done to its parent, in words"""
    parents: tuple[str, ...]
    parameters: int
    zeros: int
    """weights that its card names as pruned"""
    bytes: int
    """of its weights"""
    steps: int
    tokens: float
    """that its own run read"""
    flops: float
    """of its own run"""
    total: float
    """with those of all it came from"""
    total_tokens: float
    sources: tuple[str, ...]
    results: dict[str, float]
    latency: float | None
    """of a forward pass, over that of the incumbent it was compared with"""
    fate: str
    """promoted, refused, forced or empty"""


@dataclasses.dataclass(frozen=True)
class Life:
    """All that a report shows."""

    name: str
    current: str
    """hash of the version that the name stands for"""
    versions: tuple[Version, ...]
    """in the order of making"""
    tree: str
    qualities: dict[str, dict[str, float]]
    """value of each check of the gates by version"""
    units: dict[str, str]
    """what a check measures"""
    verdicts: tuple[dict[str, Any], ...]
    moves: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Raw:
    """HTML as it is."""

    text: str


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; numbers are set flush right."""
    rows = [list(row) for row in rows]
    numeric = [all(isinstance(row[i], (int, float)) or row[i] is None for row in rows) for i in range(len(head))]

    def cell(tag: str, i: int, x: Any) -> str:
        text = x.text if isinstance(x, Raw) else html.escape(short(x))
        return f"<{tag}{' class=n' if numeric[i] else ''}>{text}</{tag}>"

    def line(tag: str, row: Sequence[Any]) -> str:
        return "<tr>" + "".join(cell(tag, i, x) for i, x in enumerate(row)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{line("th", head)}</thead><tbody>{body}</tbody></table></div>'


def short(x: Any) -> str:
    """A value as it is read: four digits of a number, a dash for nothing."""
    if x is None:
        return "–"
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return str(x)
    return f"{x:,}" if isinstance(x, int) else f"{x:.4g}"


def plot(
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    what: str,
    hollow: Sequence[bool] = (),
    logarithmic: bool = False,
) -> str:
    """Lines over the versions as SVG; versions that were refused are hollow and not joined."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": what, "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axis = figure.subplots()
        refused = list(hollow) or [False] * len(names)
        for i, (label, values) in enumerate(series.items()):
            colour, mark = COLOURS[i % len(COLOURS)], "os^vDP*"[i % 7]
            kept = [(x, y) for x, (y, out) in enumerate(zip(values, refused)) if y is not None and not out]
            lost = [(x, y) for x, (y, out) in enumerate(zip(values, refused)) if y is not None and out]
            if kept:
                axis.plot(*zip(*kept), color=colour, marker=mark, label=label)
            if lost:
                axis.plot(*zip(*lost), color=colour, marker=mark, linestyle="", fillstyle="none", markersize=8)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set_xlim(-0.4, len(names) - 0.6)
        axis.set_ylabel(what)
        if logarithmic:
            axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
        if len(series) > 1:
            axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()[text.getvalue().index("<svg") :]
    # Several pictures in one page must not share the names of their parts.
    own = re.sub(r"\W+", "-", what)
    drawn = re.sub(r'\bid="', f'id="{own}-', drawn)
    return re.sub(r"(url\(#|href=\"#)", rf"\g<1>{own}-", drawn)


def figure(drawn: str, caption: str) -> str:
    """A picture with what it shows, which is its text for those who do not see it, too."""
    told = html.escape(caption)
    labelled = drawn.replace("<svg", f'<svg role="img" aria-label="{told}"', 1)
    return f"<figure>{labelled}<figcaption>{told}</figcaption></figure>"


def render(life: Life) -> str:
    """The page."""
    versions, labels = life.versions, [v.name for v in life.versions]
    refused = [v.fate == "refused" for v in versions]
    now = next((v for v in versions if v.hash == life.current), None)
    parts = [f"<h1>The life of {html.escape(life.name)}</h1>"]
    if now is not None:
        parts.append(
            f"<p><b>{html.escape(life.name)}</b> stands for <b>{html.escape(now.name)}</b> (<code>{now.hash[:12]}</code>): "
            f"{now.parameters / 1e6:.2f}M parameters, {now.total:.3g} floating-point operations and {now.total_tokens:.3g} tokens in all since "
            f"the first of {len(versions)} versions.</p>"
        )
    parts += ["<h2>Versions</h2>", f"<pre>{html.escape(life.tree)}</pre>", _versions(life)]
    parts += ["<h2>Quality over the life</h2>", *_qualities(life, labels, refused)]
    parts += ["<h2>Forgetting</h2>", _forgetting(life)]
    sizes: dict[str, Sequence[float | None]] = {"weights": [v.bytes / 1e6 for v in versions]}
    parts += [
        "<h2>Size and latency</h2>",
        figure(plot(labels, sizes, "MB", refused), "Size of the weights, MB."),
        _sizes(life),
    ]
    work: dict[str, Sequence[float | None]] = {
        "in all": [v.total for v in versions],
        "own": [v.flops or None for v in versions],
    }
    parts += [
        "<h2>Compute</h2>",
        figure(
            plot(labels, work, "operations", refused, logarithmic=True),
            "Floating-point operations of each version's own run, and with those of all that it came from.",
        ),
        "<h2>Data</h2>",
        table(
            ["version", "sources", "tokens read"], [[v.name, ", ".join(v.sources) or None, v.tokens] for v in versions]
        ),
        "<h2>Gates</h2>",
        _gates(life),
        "<h2>Moves</h2>",
        table(
            ["time", "action", "version", "why", "forced"],
            [
                [m["time"], m["action"], m["hash"][:12], m.get("why", ""), "yes" if m.get("forced") else "no"]
                for m in life.moves
            ],
        ),
    ]
    title = html.escape(f"The life of {life.name}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _fate(fate: str) -> Raw:
    kind = {"promoted": "yes", "refused": "no", "forced": "no"}.get(fate, "")
    return Raw(f'<span class="{kind}">{html.escape(fate) or "–"}</span>')


def _versions(life: Life) -> str:
    rows = [
        [
            v.name,
            Raw(f"<code>{v.hash[:12]}</code>"),
            v.made,
            v.parameters,
            f"{v.zeros / v.parameters:.0%}",
            v.steps,
            _fate(v.fate),
        ]
        for v in life.versions
    ]
    return table(["version", "hash", "what was done", "parameters", "pruned", "steps", "fate"], rows)


def _qualities(life: Life, labels: list[str], refused: list[bool]) -> list[str]:
    """A plot for each unit, of all checks that are measured in it."""
    made = []
    for unit in dict.fromkeys(life.units.values()):
        series = {
            check: [values.get(v.hash) for v in life.versions]
            for check, values in life.qualities.items()
            if life.units[check] == unit
        }
        told = (
            f"{unit} of each version on what the gates' suite holds out; hollow marks are versions that a gate refused."
        )
        made.append(figure(plot(labels, series, unit, refused), told))
    return made or ['<p class="note">No gate has measured a version.</p>']


def _forgetting(life: Life) -> str:
    """What each version has lost on each check against the best before it."""
    if not life.qualities:
        return '<p class="note">No gate has measured a version.</p>'
    rows, best = [], dict[str, float]()
    for v in life.versions:
        row: list[Any] = [v.name]
        for check, values in life.qualities.items():
            value, sign = values.get(v.hash), -1 if life.units[check].startswith("accuracy") else 1
            row.append(None if value is None or check not in best else sign * value - best[check])
            if value is not None and v.fate != "refused":
                best[check] = min(best.get(check, sign * value), sign * value)
        rows.append(row)
    units = [f"{check} ({life.units[check]})" for check in life.qualities]
    told = (
        '<p class="note">What a version loses against the best before it, refused ones left out; above 0 is worse.</p>'
    )
    return told + table(["version", *units], rows)


def _sizes(life: Life) -> str:
    rows = [[v.name, v.bytes / 1e6, v.latency] for v in life.versions]
    return table(["version", "MB", "time of a forward pass over the incumbent's"], rows)


def _gates(life: Life) -> str:
    known = {v.hash: v.name for v in life.versions}

    def name(x: str | None) -> str:
        return "nothing" if x is None else known.get(x, x[:12])

    rows = [
        [
            verdict["time"],
            name(verdict["candidate"]),
            name(verdict["incumbent"]),
            Raw('<span class="yes">passed</span>' if verdict["passed"] else '<span class="no">refused</span>'),
            "; ".join(verdict["reasons"]) or None,
        ]
        for verdict in life.verdicts
    ]
    return table(["time", "candidate", "against", "verdict", "reasons"], rows)
