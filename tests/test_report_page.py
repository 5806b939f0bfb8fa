"""The page about an artifact: what it says, that nothing in a file breaks out of it, and how a browser sees it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from commands import Cli, ok, one_line
from halfweight.eval import speed
from halfweight.eval.report import charts, write_page
from halfweight.eval.report.facts import by_block
from halfweight.eval.report.page import escape_markdown

HOSTILE = '<script>alert("x")</script><img src=http://x/y onerror=alert(1)>|`*'


class Tags(HTMLParser):
    """Every tag with its attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def finished(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact whose reports a test may change."""
    return Path(shutil.copytree(artifact, tmp_path / "llama-2of4"))


def change_report(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "report.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture(scope="module")
def benched(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of bench, as JSON."""
    result = speed.bench(artifact, batches=(1, 2), prompt=4, new=2, rounds=1, dtypes=("float32",), threads=(1,))
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    file.write_text(result.model_dump_json(), encoding="utf-8")
    return file


@pytest.fixture
def rivals(tmp_path: Path) -> Path:
    """A comparison as scripts/compare_llmcompressor.py writes it."""
    rows = [
        {"model": "tiny", "tool": "dense", "method": "-", "perplexity": 20.0},
        {"model": "tiny", "tool": "llmcompressor", "method": "sparsegpt", "perplexity": 80.0, "seconds": 9.0},
        {"model": "tiny", "tool": "halfweight", "method": "admm", "perplexity": 60.0, "linear_bytes_ratio": 0.5625},
    ]
    file = tmp_path / "compare.json"
    file.write_text(json.dumps({"rows": rows, "protocol": {}, "machine": {}}), encoding="utf-8")
    return file


def full_page(folder: Path, benched: Path, rivals: Path, other: Path) -> tuple[str, str]:
    def searched(report: dict[str, Any]) -> None:
        report["search"] = [{"objective": 3.0, "detail": "start"}, {"objective": 2.0}, {"objective": 2.5}]

    change_report(folder, searched)
    files = write_page(folder, compare=[other], rivals=[rivals], bench=benched, command="halfweight report x")
    html, markdown = (file.read_text(encoding="utf-8") for file in files)
    return html, markdown


# --- what it says ---


def test_the_page_holds_every_part_and_its_twin_the_same_numbers(
    finished: Path, artifact: Path, benched: Path, rivals: Path
) -> None:
    html, markdown = full_page(finished, benched, rivals, artifact)
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    words = Tags(html).words
    parts = ("At a glance", "Quality against bits", "Layers", "Search", "Speed", "Calibration", "Recipe", "Provenance")
    for part in parts:
        assert part in words
        assert f"## {part}" in markdown
    decode = json.loads(benched.read_text(encoding="utf-8"))["models"][0]["decode"]["median"]
    for number in (f"{report['dev']['compressed']:.3f}", f"{report['effective_bits']:.2f}", f"{decode:.1f}"):
        assert number in words and number in markdown
    for layer in report["layers"]:
        assert layer["name"] in words
    assert report["windows_sha256"] in words and report["versions"]["torch"] in words
    assert "llmcompressor sparsegpt" in words
    assert words.count("pattern: '2:4'") == 1  # the recipe as it ran


def test_every_cell_of_the_heat_map_is_a_layer(finished: Path) -> None:
    html = write_page(finished)[0].read_text(encoding="utf-8")
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    cells = re.findall(r"<title>(\w+), block (\d+): relative output error", html)
    assert sorted(cells) == sorted(
        (layer["name"].split(".")[-1], layer["name"].split(".")[2]) for layer in report["layers"]
    )


def test_runs_on_other_text_are_marked_and_left_out_of_the_plot(finished: Path, artifact: Path) -> None:
    change_report(finished, lambda report: report.update(calibration_data="elsewhere.txt"))
    html = write_page(finished, compare=[artifact])[0].read_text(encoding="utf-8")
    assert "measured on another model or text" in html and "Quality against bits" not in html


def test_scores_say_what_tokens_read_where_they_select(finished: Path, tmp_path: Path) -> None:
    plain = {"model": "plain", "text": "t", "perplexity": 20.0, "tokens": 9, "seqlen": 10}
    files = [tmp_path / "plain.json", tmp_path / "selecting.json"]
    for file, score in zip(files, (plain, plain | {"model": "selecting", "bits_read": 8.25}), strict=True):
        file.write_text(json.dumps(score), encoding="utf-8")
    assert "bits read" not in write_page(finished, scored=files[:1])[1].read_text(encoding="utf-8")
    page = write_page(finished, scored=files)[1].read_text(encoding="utf-8")
    assert "window | bits read |" in page
    assert "| selecting | t | 20.000 | 9 | 10 | 8.25 |" in page and "| plain | t | 20.000 | 9 | 10 | - |" in page


def test_the_page_asks_for_nothing(finished: Path, artifact: Path, benched: Path, rivals: Path) -> None:
    html, _ = full_page(finished, benched, rivals, artifact)
    for tag, attributes in Tags(html).tags:
        assert tag not in ("script", "img", "iframe", "object")
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


def test_what_files_say_is_escaped(finished: Path, rivals: Path) -> None:
    def poison(report: dict[str, Any]) -> None:
        report.update(
            model=HOSTILE, recipe=HOSTILE, note=HOSTILE, calibration_data=HOSTILE, versions={HOSTILE: HOSTILE}
        )
        report["search"] = [{"objective": 1.0, "detail": HOSTILE}]
        for layer in report["layers"]:
            layer.update(method=HOSTILE, numbers=HOSTILE)

    change_report(finished, poison)
    rivals.write_text(
        rivals.read_text(encoding="utf-8").replace("sparsegpt", json.dumps(HOSTILE)[1:-1]), encoding="utf-8"
    )
    html, markdown = (f.read_text(encoding="utf-8") for f in write_page(finished, rivals=[rivals], title=HOSTILE))
    assert not {tag for tag, _ in Tags(html).tags} & {"script", "img"}
    outside_code = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert not any("<script" in line or "<img" in line for line in outside_code)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_markdown_cells_stay_cells() -> None:
    assert escape_markdown("a|b\n*c* <d>") == "a\\|b \\*c\\* &lt;d&gt;"


# --- bad input ---


def test_bad_files_are_one_line(finished: Path, artifact: Path, rivals: Path, cli: Cli, tmp_path: Path) -> None:
    assert "no report.json" in one_line(cli("report", tmp_path))
    rivals.write_text('{"rows": []}', encoding="utf-8")
    assert "compare.json: rows: " in one_line(cli("report", finished, "--rivals", rivals))
    rivals.write_text('{"rows": [{"model": "m", "tool": "t", "perplexity": NaN}]}', encoding="utf-8")
    assert "compare.json: rows.0.perplexity" in one_line(cli("report", finished, "--rivals", rivals))
    assert "name an .html file" in one_line(cli("report", finished, "--out", tmp_path / "page.txt"))
    assert "cannot write" in one_line(cli("report", finished, "--out", tmp_path / "nowhere" / "page.html"))
    change_report(finished, lambda report: report.pop("dev"))
    assert "report.json: dev: Field required" in one_line(cli("report", finished))


def test_the_verb_names_what_it_wrote(finished: Path, cli: Cli, rivals: Path) -> None:
    result = ok(cli("report", finished, "--rivals", rivals))
    assert result.out.splitlines() == [str(finished / "report.html"), str(finished / "report.md")]
    assert f"halfweight report {finished} --rivals {rivals}" in (finished / "report.html").read_text(encoding="utf-8")


# --- charts ---


def test_names_are_sorted_into_kinds_and_blocks() -> None:
    names = ["model.layers.0.mlp.up", "model.layers.11.mlp.up", "model.layers.11.attn.q", "lm_head"]
    kinds, blocks, place = by_block(names)
    assert (kinds, blocks) == (["mlp.up", "attn.q"], 12)
    assert [place(name) for name in names] == [(0, 0), (0, 11), (1, 11), None]


@pytest.mark.parametrize(
    "values",
    [[5.0], [0.0, 0.0], [1e-9, 3e9], [-2.0, 7.5], [16.2, 39.1, 18.2]],
    ids=["one", "zeros", "huge", "negative", "usual"],
)
def test_axes_hold_their_values(values: list[float]) -> None:
    svg = ElementTree.fromstring(charts.profile({"a": values}, "x", "y"))
    height = float(svg.attrib["viewBox"].split()[3])
    marks = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")]
    assert len(marks) == len(values)
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= height for x, y in marks)
    assert [y for _, y in sorted(marks, key=lambda mark: -mark[1])] == [
        y for _, (_, y) in sorted(zip(values, marks, strict=True), key=lambda pair: pair[0])
    ]


def test_scatter_labels_do_not_cover_each_other() -> None:
    points = [charts.Point(9.0, 60.0 + i / 10, f"method {i}", 0) for i in range(5)]
    svg = ElementTree.fromstring(charts.scatter(points, "bits", "perplexity", (20.0, "dense")))
    rows = sorted(float(t.attrib["y"]) for t in svg.iter("text") if t.attrib["class"] == "label")
    assert len(rows) == 5
    assert all(later - earlier >= 12 for earlier, later in itertools.pairwise(rows))


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by playwright; skipped where either is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it(
    browser: Any, finished: Path, artifact: Path, benched: Path, rivals: Path, scheme: str, width: int
) -> None:
    full_page(finished, benched, rivals, artifact)
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((finished / "report.html").as_uri())
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        page.evaluate("Math.min(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height))")
        > 100
    )
    ink, ground = (
        page.evaluate(f"getComputedStyle(document.body).{name}").removeprefix("rgb(").split(",")[0]
        for name in ("color", "backgroundColor")
    )
    assert (int(ink) > int(ground)) == (scheme == "dark")
    context.close()
