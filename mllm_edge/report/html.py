"""Profiles as one HTML file that needs nothing else: no network, no script."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mllm_edge.report import charts
from mllm_edge.runtime.profiling.files import write_whole
from mllm_edge.runtime.profiling.operators import Operator, by_kind, top

__all__ = ["page", "write_html"]

_LONGEST = 6
_TEMPLATE = Path(__file__).with_name("report.html")


def write_html(profiles: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the page of one profile, or of the profiles of a sweep, in their JSON form; whole or not at all.

    Raises MllmEdgeError when matplotlib is missing.
    """
    write_whole(path, page(profiles))


def page(profiles: Sequence[Mapping[str, Any]]) -> str:
    """The page's text; arguments and errors as in `write_html`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"ms": lambda seconds: f"{1e3 * seconds:.3g}", "mb": lambda n: f"{n / 1e6:,.1f}"}
    titles = [_title(p) for p in profiles]
    parts = [(title, p, _drawings(p), _operators(p)) for title, p in zip(titles, profiles, strict=True)]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        titles=titles,
        sweep=Markup(charts.sweep(profiles, titles)) if len(profiles) > 1 else None,
        parts=parts,
    )


def _title(profile: Mapping[str, Any]) -> str:
    """What is special about a profile of a sweep; of one alone, the bundle."""
    point = profile.get("point", {})
    return ", ".join(f"{key} {value}" for key, value in point.items()) or profile["bundle"]["path"]


def _drawings(profile: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Heading and chart of all that was measured."""
    wanted = [
        ("Stages", charts.stages, True),
        ("From token to token", charts.intervals, profile["tpot"]),
        ("Roofline", charts.roofline, profile.get("roofline")),
        ("Memory", charts.memory, True),
        ("Power", charts.power, profile.get("power", {}).get("rails")),
    ]
    return [(heading, Markup(draw(profile))) for heading, draw, given in wanted if given]


def _operators(profile: Mapping[str, Any]) -> tuple[Operator, ...]:
    """The kinds of operators that take longest, by stage."""
    return top(by_kind([Operator(**o) for o in profile.get("operators", [])]), _LONGEST)
