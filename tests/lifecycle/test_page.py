"""The page of a life: well formed, self-contained, readable in a browser on a phone and on paper."""

import html.parser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llm_jax.lifecycle.page import Life, Version, plot, render, short

VOID = {"meta", "br", "img", "path", "use", "rect", "line", "circle"}


def version(number: int, fate: str, **more) -> Version:
    given = dict(
        hash=f"{number:064x}",
        name=f"v{number}",
        made="prune(0.5) & <more>",
        parents=(f"{number - 1:064x}",) if number else (),
        parameters=2_500_000,
        zeros=1_000_000 if number == 3 else 0,
        bytes=10_000_000 - number * 10**6,
        steps=100,
        tokens=1e5,
        flops=1e12,
        total=1e12 * (number + 1),
        total_tokens=1e5 * (number + 1),
        sources=("asset:sotu#date=..1945",),
        results={"loss": 4.0},
        latency=1.0 if number else None,
        fate=fate,
    )
    return Version(**{**given, **more})


@pytest.fixture
def life() -> Life:
    fates = ("promoted", "promoted", "refused", "promoted", "forced", "")
    versions = tuple(version(i, fate) for i, fate in enumerate(fates))
    qualities = {
        "old": {v.hash: 3.5 + 0.1 * i for i, v in enumerate(versions)},
        "new": {versions[0].hash: 4.5, versions[1].hash: 3.9},
    }
    verdict = {
        "time": "2026-11-26T10:00:00+00:00",
        "candidate": versions[2].hash,
        "incumbent": versions[1].hash,
        "passed": False,
        "reasons": ["old lost 0.3 <nats>"],
    }
    move = {
        "time": "2026-11-26T11:00:00+00:00",
        "action": "promote",
        "hash": versions[3].hash,
        "why": "it passed",
        "forced": False,
    }
    units = dict.fromkeys(qualities, "loss, nats a token")
    return Life("production", versions[3].hash, versions, "● first\n│\n● second", qualities, units, (verdict,), (move,))


class Checker(html.parser.HTMLParser):
    """Whether tags are closed in the order in which they were opened, and which ids and links there are."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_it_is_well_formed_and_needs_nothing_else(life: Life):
    page = render(life)
    checker = Checker()
    checker.feed(page)
    assert not checker.open and len(set(checker.ids)) == len(checker.ids)
    assert all(link.startswith("#") for link in checker.links)  # no file, no network
    assert {link[1:] for link in checker.links} <= set(checker.ids)
    assert set(re.findall(r"url\(#(.*?)\)", page)) <= set(checker.ids)
    text = "".join(checker.text)
    for said in (
        "prune(0.5) & <more>",
        "old lost 0.3 <nats>",
        "v3",
        "● second",
        "it passed",
        "refused",
        "40%",
        "asset:sotu#date=..1945",
    ):
        assert said in text, said
    assert render(life) == page  # nothing of chance or of the clock


def test_what_a_version_loses_is_against_the_best_before_it(life: Life):
    """Old: 3.5, 3.6, 3.7 (refused), 3.8: the fourth loses 0.3 against the first, whatever the refused one had."""
    page = render(life)
    forgetting = page[page.index("Forgetting") : page.index("Size and latency")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in forgetting.split("<tr>")[2:]]
    assert [(row[0], row[1]) for row in rows][:4] == [("v0", "–"), ("v1", "0.1"), ("v2", "0.2"), ("v3", "0.3")]


def test_a_life_of_one_version_without_a_gate():
    first = version(0, "forced")
    page = render(Life("p", first.hash, (first,), "● first", {}, {}, (), ()))
    assert "No gate has measured a version." in page


def test_numbers_are_short():
    assert [short(x) for x in (None, 2_500_000, 0.123456, 1e12, "x", True)] == [
        "–",
        "2,500,000",
        "0.1235",
        "1e+12",
        "x",
        "True",
    ]


def test_refused_versions_are_hollow():
    drawn = plot(["a", "b"], {"x": [1.0, 2.0]}, "loss", [False, True])
    assert "fill: none" in drawn.split("legend")[0] and drawn.count("<svg") == 1


BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(
    not BROWSER, reason="no Chromium on this machine (Debian's package chromium; CHROMIUM names another)"
)
def test_in_a_browser_on_a_phone_and_on_paper(life: Life, tmp_path: Path):
    """Nothing is wider than a phone's screen but what scrolls within itself, every picture is drawn, and it can be printed."""
    probe = (
        "<script>addEventListener('load', () => {document.title = JSON.stringify([document.documentElement.scrollWidth, innerWidth,"
        "[...document.querySelectorAll('figure svg')].map(x => x.getBoundingClientRect().height > 50)]);"
        "document.body.append(document.title)})</script></body>"
    )
    (tmp_path / "life.html").write_text(render(life).replace("</body>", probe), encoding="utf-8")
    address = f"file://{tmp_path}/life.html"
    common = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path}/p",
    ]

    def browse(*arguments: str) -> str:
        return subprocess.run(
            [BROWSER, *common, *arguments, address], capture_output=True, text=True, timeout=120, check=True
        ).stdout

    found = re.findall(r"\[(\d+),(\d+),\[([a-z,]+)\]\]</body>", browse("--dump-dom", "--window-size=500,900"))
    (width, inner, drawn), *_ = found
    assert int(width) <= int(inner) and drawn.split(",") == ["true"] * 3
    browse(f"--print-to-pdf={tmp_path}/life.pdf", "--no-pdf-header-footer")
    assert (tmp_path / "life.pdf").read_bytes()[:5] == b"%PDF-"
