"""The HTML report: complete, self-contained, and unmoved by hostile names, empty sections and numbers that are none."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from adaattn.export.report.html import render

SECTIONS = [
    "errors", "targets", "outputs", "compared", "warnings", "attention", "plan", "calibration", "inputs", "versions",
    "command", "seconds",
]  # fmt: skip
VOID = {"meta", "br", "wbr", "link", "img", "hr", "input"}
NASTY = """</title><script>alert("x")</script><img src='http://evil.example/a.png' onerror="x"> $\\frac{1}{2}$ $\\bad"""
CONTROLS = "\x00\x1b[31m\x85\u202e\udcff"


class Page(HTMLParser):
    """A page's elements as (tag, attributes, text), in the order in which they open; fails where tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {[tag for tag, _ in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("td", "th", "small"):
            self.handle_data(" ")
        text: list[str] = []
        self.elements.append((tag, dict(attrs), text))
        if tag not in VOID:
            self.open.append((tag, text))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert [element[0] for element in self.open[-1:]] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, text in self.open:
            text.append(data)

    def texts(self, *tags: str) -> list[str]:
        return [" ".join("".join(text).split()) for tag, _, text in self.elements if tag in tags]

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes, _ in self.elements if attribute in attributes]


def output(name: str, case: str, error: float | None, **changes: Any) -> dict[str, Any]:
    base = {"eager_error": 3.1e-5, "limit": 1e-3, "max_abs": 0.25, "worst": [0, 17, 3], "verdict": "passed"}
    base |= {"cosine": 1 - 2e-7, "ulp": [0.5, 3.0, 17.0]}
    return {"name": name, "case": case, "error": error, "reason": None, **base, **changes}


@pytest.fixture
def report() -> dict[str, Any]:
    def target(name: str, verdict: str, **changes: Any) -> dict[str, Any]:
        base = {
            "reason": None,
            "artifacts": [],
            "seconds": 1.24,
            "outputs": [],
            "histogram": None,
            "plans": None,
            "compared": None,
            "heads": [],
            "ops": None,
        }
        return {"name": name, "verdict": verdict, **base, **changes}

    return {
        "verdict": "failed",
        "model": {"source": "model.pt", "class": "Encoder", "dtype": "float32", "parameters": 22713216},
        "warnings": ["no timing cache"],
        "tokens": {"shortest": 1, "odd": 127, "longest": 512},
        "calibration": {
            "batches": 12, "residue": 1e-3, "refused": {"stack.1.attention": "it is dense"},
            "layers": [
                {"name": "stack.0.attention", "tokens": 900, "ranks": [60.0, 31.5], "beyond": [[1.0, 0.5], [1.0, 0.1]]},
            ],
        },
        "inputs": {"x": "B,S,64:float32"},
        "dims": {"B": "1:1:8"},
        "opset": 20,
        "targets": [
            target(
                "onnx",
                "passed",
                artifacts=[{"path": "model.onnx", "bytes": 3 << 20}, {"path": "model.data", "bytes": 1 << 19}],
                outputs=[output("y", "shortest", 1.2e-5), output("y", "longest", 2.5e-4)],
                histogram={"log10_edges": [-6.0, -5.0, -4.0], "counts": [10, 3]},
                plans={"heads": 771, "differ": 5, "excused": 4},
                heads=[
                    {"layer": f"stack.{n}.attention", "head": n, "error": 1e-3 * n, "eager_error": 1e-4, "case": "odd",
                     "worst": [0, n, 2], "max_abs": 0.5, "cosine": 1 - 1e-6, "ulp": [1.0, 2.0, 9.0], "lost": 0}
                    for n in range(7)
                ],
            ),
            target(
                "tensorrt",
                "failed",
                reason="y is over its limit.\nSecond line.",
                outputs=[output("y", "odd", 1e-4), output("z", "odd", 4e-3, verdict="failed", reason="over")],
            ),
            target("tensorrt-rtx", "not run", reason="no GPU here", artifacts=[{"path": "m.engine", "bytes": 2048}]),
        ],
        "layers": [
            {
                "name": "stack.0.attention", "tolerance": 1e-2, "head_dim": 64,
                "precision": ["fp32", "bf16", "fp16", "int8", "int8_fp8"], "rank": [64, 64.0, 31.96, 12.6, 48],
                "predicted": [1e-6, 1e-3, 1e-4, 4e-3, 7e-3], "measured": [2e-6, 2e-3, 1e-4, 2e-2, 5e-3],
            },
            {
                "name": "stack.1.attention", "tolerance": None, "head_dim": 64,
                "precision": ["int8"], "rank": [64], "predicted": [1e-3], "measured": [9.0],
            },
        ],
        "versions": {"torch": "2.11.0"},
        "command": "adaattn-export model.pt --dim 'B=1:1:8'",
        "seconds": {"capture": 3.14, "report": 0.04},
    }  # fmt: skip


def test_sections_come_in_order_after_the_verdict(report: dict[str, Any]) -> None:
    page = Page(render(report))
    assert page.texts("h1", "h2")[0] == "failed"
    assert [attributes["id"] for tag, attributes, _ in page.elements if tag == "h2"] == SECTIONS
    assert {link[1:] for link in page.values("href") if link[1:] in SECTIONS} == set(SECTIONS)


def test_sentence_says_what_became_of_each_target(report: dict[str, Any]) -> None:
    said = Page(render(report)).texts("p")[0]
    assert said == (
        "onnx passed; tensorrt failed (y is over its limit); tensorrt-rtx was built but not run (no GPU here)."
    )
    report["targets"][2]["artifacts"] = []
    report["targets"][1].update(name="ort", verdict="passed")
    assert Page(render(report)).texts("p")[0] == "onnx and ort passed; tensorrt-rtx was not run (no GPU here)."


def test_rows_hold_the_numbers(report: dict[str, Any]) -> None:
    report["targets"][0]["compared"] = {
        "cases": 5, "elements": 9000, "of_elements": 10000, "forced": ["fp32"], "integers": {}, "plan_steps": 6,
    }  # fmt: skip
    rows = [row.replace("\u2013", "-") for row in Page(render(report)).texts("tr")]
    expected = [
        "onnx passed 2.5e-04 y, longest 3.1e-05 1.0e-03 3.5 MiB 1.2 s "
        "5 cases, 9,000 elements (90 %); plans forced to fp32; 6 steps of the plans reached -",
        "tensorrt failed 4.0e-03 z, odd 3.1e-05 1.0e-03 - 1.2 s - y is over its limit. Second line.",
        "tensorrt-rtx not run - - - 0.002 MiB 1.2 s - no GPU here",
        "y shortest 1.2e-05 3.1e-05 1.0e-03 0.01 2.5e-01 2.0e-07 3.0e+00 1.7e+01 [0, 17, 3] passed",
        "z odd 4.0e-03 3.1e-05 1.0e-03 4.00 2.5e-01 2.0e-07 3.0e+00 1.7e+01 [0, 17, 3] failed over",
        "stack.6.attention 6 6.0e-03 1.0e-04 odd 5.0e-01 1.0e-06 2.0e+00 9.0e+00 [0, 6, 2]",
        "y, shortest 1.2e-05 passed -", "z, odd - 4.0e-03 failed",
        "stack.0.attention 900 60.0 31.5", "stack.1.attention it is dense",
        "x B,S,64:float32", "B 1:1:8", "torch 2.11.0", "capture 3.1 s", "report 0.0 s",
    ]  # fmt: skip
    assert [row for row in expected if row not in rows] == []
    failed, passed = (next(n for n, row in enumerate(rows) if row.startswith(start)) for start in ("z odd", "y odd"))
    assert failed < passed, "failed outputs come first"


def test_plan_is_a_table_of_letters_and_ranks(report: dict[str, Any]) -> None:
    page = Page(render(report))
    cells = [(a["class"], "".join(text).strip()) for tag, a, text in page.elements if "cell" in (a.get("class") or "")]
    assert [cell for cell in cells if cell[1][1:]] == [
        ("cell fp32", "F64"),
        ("cell bf16", "B64"),
        ("cell fp16", "H32"),
        ("cell int8 over", "I13\u00a0!"),
        ("cell int8_fp8", "E48"),
        ("cell int8", "I64"),  # its layer has no tolerance to be over
    ]
    assert "Layers: 2. Heads: 6. Mean rank: 74 % of the head dimension. Heads measured above the tolerance: 1." in (
        page.texts("p")
    )
    assert "stack.0.attention, head 3: int8, mean rank 12.6 of 64, predicted error 4.0e-03, measured 2.0e-02" in (
        " ".join(title.split()) for title in page.values("title")
    )


def test_tables_and_figures_are_accessible(report: dict[str, Any]) -> None:
    page = Page(render(report))
    tags = [tag for tag, _, _ in page.elements]
    assert tags.count("caption") == tags.count("table") == 12
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes, _ in page.elements if tag == "th")
    ids = page.values("id")
    assert len(ids) == len(set(ids)), "ids repeat"
    figures = [attributes for tag, attributes, _ in page.elements if tag == "svg"]
    assert len(figures) == 4
    assert all(figure["role"] == "img" for figure in figures)
    assert set(page.values("aria-labelledby")) <= set(ids)
    assert {name[1:] for name in page.values("href") + page.values("xlink:href")} <= set(ids)


def test_nothing_is_fetched(report: dict[str, Any]) -> None:
    source = render(report)
    assert set(re.findall(r"""(\S+?)=["']?\w*:?//""", source)) <= {"xmlns", "xmlns:xlink"}
    assert not re.search(r"https?://", re.sub(r'xmlns(:xlink)?="[^"]*"', "", source))
    assert not re.search(r"@import|url\((?!#)", source)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _, _ in Page(source).elements}
    assert len(re.findall("<style", source)) == 1, "a figure brought a style sheet of its own"
    assert not re.search(r"#0000(0[0-9a-f])\b", source), "a figure kept a colour that follows no theme"


def test_names_are_escaped(report: dict[str, Any]) -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [spoil(inner) for inner in value]
        return NASTY if isinstance(value, str) else value

    spoilt = spoil(report)
    spoilt["inputs"] = spoilt["dims"] = spoilt["versions"] = {NASTY: NASTY}
    spoilt["seconds"] = {NASTY: 1.0}
    page = Page(render(spoilt))
    assert not {"script", "img"} & {tag for tag, _, _ in page.elements}
    assert not page.values("onerror")
    assert NASTY in page.texts("h1")[0]
    assert NASTY in page.texts("code")


SHORT = ["tokens", "calibration", "warnings", "inputs", "dims", "targets", "layers", "versions", "command", "seconds"]


@pytest.mark.parametrize("as_none", [False, True])
@pytest.mark.parametrize("empty", [SHORT, ["targets"], ["layers"]], ids=",".join)
def test_empty_sections_say_so(report: dict[str, Any], empty: list[str], as_none: bool) -> None:
    report.update({key: None if as_none else type(report[key])() for key in empty})
    source = render(report)
    page = Page(source)
    assert [attributes["id"] for tag, attributes, _ in page.elements if tag == "h2"] == SECTIONS
    for section in source.split("<section ")[1:]:
        body = Page("<section " + section.split("</section>")[0] + "</section>")
        assert any(body.texts("p", "table", "li", "figure", "code")), section


def test_control_characters_are_escapes_and_lines_stay_lines(report: dict[str, Any]) -> None:
    report["targets"][0]["name"] = report["model"]["source"] = f"{NASTY}{CONTROLS}"
    report["targets"][1]["reason"] = f"one{CONTROLS}\ntwo"
    report["inputs"] = {CONTROLS: CONTROLS}
    source = render(report)
    assert all(line.replace("\u00a0", "").isprintable() for line in source.split("\n"))
    escaped = "\\x00\\x1b[31m\\x85\\u202e\\udcff"
    page = Page(source)
    assert page.texts("code")[0] == f"{NASTY}{escaped}"
    assert f"{NASTY}{escaped}" in page.texts("text"), "in a figure too, where $ begins no formula"
    assert f"one{escaped}\ntwo" in source


def test_targets_without_outputs_and_heads_without_errors(report: dict[str, Any]) -> None:
    for target in report["targets"]:
        target.update(outputs=None, artifacts=None, histogram=None)
    for layer in report["layers"]:
        layer.update(predicted=[], measured=[])
    texts = Page(render(report)).texts("p")
    assert "No outputs were compared: no GPU here" in texts
    assert "No errors were measured." in texts
    assert any("above the tolerance: 0." in text for text in texts)


@pytest.mark.parametrize(("value", "printed"), [(None, "–"), (math.nan, "NaN"), (math.inf, "inf"), (0.0, "0")])
def test_numbers_that_cannot_be_drawn_are_printed(report: dict[str, Any], value: float | None, printed: str) -> None:
    report["targets"][1]["outputs"][1].update(error=value, eager_error=value, limit=value, max_abs=value)
    report["targets"][0]["histogram"]["log10_edges"] = [value, -5.0, -4.0, value]
    report["targets"][0]["histogram"]["counts"] = [1, 2, 3]
    report["layers"][0]["predicted"][0] = value
    report["layers"][0]["measured"][0] = value
    report["layers"][0]["rank"][0] = value
    page = Page(render(report))
    (row,) = [row for row in page.texts("tr") if row.startswith("z odd")]
    assert row.split()[2:5] == [printed] * 3
    assert row.split()[6] == printed
    assert any(text.endswith("Not drawn, being zero, NaN or infinite: 1.") for text in page.texts("figcaption"))
    over = any("head 0" in (a.get("title") or "") and "over" in (a["class"] or "") for _, a, _ in page.elements)
    assert over == (value != 0.0), "an error that is no number is no proof of staying within the tolerance"


def test_nothing_but_undrawable_numbers(report: dict[str, Any]) -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [spoil(inner) for inner in value]
        return None if isinstance(value, float) else value

    page = Page(render(spoil(report)))
    assert not [tag for tag, _, _ in page.elements if tag == "svg"]


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (48, 32)])
def test_plan_of_every_size(report: dict[str, Any], layers: int, heads: int) -> None:
    layer = {"tolerance": 1e-2, "head_dim": 128, "precision": ["int8"] * heads, "rank": [96] * heads}
    layer.update(predicted=[1e-3] * heads, measured=[1e-3] * heads)
    report["layers"] = [{"name": f"stack.{n}.attention", **layer} for n in range(layers)]
    cells = [text for tag, _, text in Page(render(report)).elements if tag == "td" and "I96" in "".join(text)]
    assert len(cells) == layers * heads


def test_report_survives_json_and_is_not_changed(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    page = render(report)
    assert report == before
    assert render(json.loads(json.dumps(report))) == page, "the same report gives the same page"


def test_style_of_the_process_is_neither_used_nor_changed(report: dict[str, Any]) -> None:
    import matplotlib

    page = render(report)
    with matplotlib.rc_context({"text.color": "red", "font.size": 30}):
        assert render(report) == page
        assert matplotlib.rcParams["text.color"] == "red"


def test_import_is_light() -> None:
    heavy = "import sys, adaattn.export.report.html; "
    heavy += "print([m for m in ('torch', 'onnx', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_pyplot_is_never_imported(report: dict[str, Any]) -> None:
    script = "import json, sys; from adaattn.export.report.html import render; render(json.load(sys.stdin))"
    script += "; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], input=json.dumps(report), text=True, check=True)
