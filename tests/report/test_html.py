"""The page of a profile: everything measured is on it, it needs nothing else, and what users write stays text."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mllm_edge.errors import MllmEdgeError
from mllm_edge.report import charts
from mllm_edge.report.html import page, write_html
from mllm_edge.runtime.profiling.measure import profile
from mllm_edge.runtime.profiling.sweep import parse_sweep, run_sweep

ROOFLINE = {
    "limits": {"read_bytes_per_second": 2e10, "flops_per_second": {"float32": 1e11, "int8": 4e11}, "measured": True},
    "roofline": [
        {"stage": "decode", "seconds": 1e-3, "bytes": 1e6, "flops": 4e6, "bound": "memory", "percent_of_limit": 5.0}
        | {"advice": "a word of advice"},
    ],
}
POWER = {
    "rails": {"VDD_IN": {"watts": 6.25, "joules": 12.5}},
    "total": ["VDD_IN"],
    "scope": "board",
    "seconds": 2.0,
    "samples": 20,
    "joules_per_token": 0.125,
    "joules_per_image": None,
    "joules_per_token_above_idle": 0.0625,
    "joules_per_image_above_idle": None,
    "idle": {"seconds": 2.0, "samples": 21, "watts": 3.125, "throttled": ["over-current oc1"]},
    "temperatures": {"cpu-thermal": {"start": 40.0, "peak": 44.5}},
    "throttled": ["over-current oc1", "cpu-throttle-alert"],
    "absent": ["RAPL: <none> here"],
}


@pytest.fixture(scope="module")
def data(tiny_bundle: Path) -> dict[str, Any]:
    return profile(tiny_bundle, "Hi", new_tokens=4, warmup=0, iterations=2, operators=True).as_dict()


class _Reader(HTMLParser):
    """Headings, text, and the places where a page could ask for something else."""

    def __init__(self, text: str):
        super().__init__()
        self.headings: list[str] = []
        self.text, self.addresses, self.tags = "", list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = {"src", "href", "xlink:href", "action", "data"}
        self.addresses += [value or "" for name, value in attrs if name in names]

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags[-1:] in (["h1"], ["h2"], ["h3"]) and data.strip():
            self.headings.append(data.strip())


def test_everything_measured_is_on_the_page(data: dict[str, Any]) -> None:
    text = page([data | ROOFLINE | {"power": POWER}])
    read = _Reader(text)
    assert read.headings[1:] == ["Stages", "From token to token", "Roofline", "Memory", "Power", "Operators"]
    assert read.tags.count("svg") == 5
    for word in ("vision encoder", "GroupQueryAttention", "VDD_IN", "a word of advice", "44.5"):
        assert word in read.text
    for words in ("0.125 Ja token, board", "Above the 3.12 W that it drew idle: 0.0625 J a token."):
        assert words in read.text
    assert "The machine throttled: over-current oc1, also at idle; cpu-throttle-alert." in read.text
    assert f"<td>{100 * data['stages']['prefill']['spread']:.1f}%</td>" in text
    assert f"<td>prefill</td><td>{1e3 * data['stages']['prefill']['median']:.3g}</td>" in text


def test_what_was_not_measured_is_not_there(data: dict[str, Any]) -> None:
    without = {key: value for key, value in data.items() if key != "operators"} | {"tpot": None}
    assert _Reader(page([without])).headings[1:] == ["Stages", "Memory"]


def test_it_needs_nothing_else(data: dict[str, Any]) -> None:
    text = page([data | ROOFLINE])
    read = _Reader(text)
    assert "script" not in read.tags
    assert "link" not in read.tags
    assert all(address.startswith("#") for address in read.addresses)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_text_stays_text(data: dict[str, Any]) -> None:
    evil = "<img src=x onerror=alert(1)>"
    hostile = data | {"bundle": data["bundle"] | {"path": evil}, "power": POWER | {"absent": [evil]}}
    read = _Reader(page([hostile]))
    assert "img" not in read.tags
    assert read.text.count(evil) >= 2


def test_ink_is_the_pages_own(data: dict[str, Any]) -> None:
    drawings = [charts.stages(data), charts.intervals(data), charts.memory(data), charts.roofline(data | ROOFLINE)]
    for drawing in drawings:
        texts = re.findall(r"<text style=\"([^\"]*)\"", drawing)
        assert texts
        assert all("currentColor" in style for style in texts)


def test_a_sweep_has_a_row_and_a_part_for_each_point(tiny_bundle: Path, tmp_path: Path) -> None:
    sweep = parse_sweep(["new=2,3"], [str(tiny_bundle)])
    profiles = run_sweep(tiny_bundle, "Hi", (), sweep, warmup=0, iterations=1)
    write_html([p.as_dict() for p in profiles], tmp_path / "sweep.html")
    read = _Reader((tmp_path / "sweep.html").read_text(encoding="utf-8"))
    assert read.headings[0] == "Sweep"
    assert [h for h in read.headings if h.startswith("new ")] == ["new 2", "new 3"]
    assert read.tags.count("svg") == 1 + 2 * 3


def test_without_matplotlib(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MllmEdgeError, match="charts need matplotlib") as caught:
        write_html([data], tmp_path / "page.html")
    assert "[report]" in (caught.value.fix or "")
    assert list(tmp_path.iterdir()) == []
