"""Charts of profiles as SVG text to be put into a page, whose own ink they have: they fit light and dark."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mllm_edge.errors import MllmEdgeError
from mllm_edge.install import install_hint
from mllm_edge.runtime.profiling.statistics import samples_needed

__all__ = ["intervals", "memory", "power", "require", "roofline", "stages", "sweep"]

Profile = Mapping[str, Any]
# Stands for the page's ink in the drawing. Colours are those that Okabe and Ito chose for colour-blind readers, which
# can be told from white and from black.
_INK, _COLOURS = "#010203", ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_STYLE: Any = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_WIDTH = 7.2  # inches, which the page scales
_GIGA, _MEGA = 1e9, 1e6


def require() -> None:
    """Raise MllmEdgeError where the library that draws is missing: to be asked before long work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise MllmEdgeError(f"charts need matplotlib ({e})", install_hint("report")) from None


def stages(profile: Profile) -> str:
    """Milliseconds of every stage: warm medians with p10 to p90, and the first call."""
    warm, cold = profile["stages"], profile["runs"][0]["cold"]["stages"]
    names = list(warm)
    places = np.arange(len(names))[::-1]
    with _figure(0.45 * len(names) + 0.9) as (figure, svg):
        axes = figure.subplots()
        medians = 1e3 * np.array([warm[name]["median"] for name in names])
        axes.barh(places + 0.2, medians, 0.38, color=_COLOURS[0], label="warm, median")
        axes.errorbar(medians, places + 0.2, xerr=_whiskers(warm, names), fmt="none", ecolor=_INK, elinewidth=1)
        axes.barh(places - 0.2, [1e3 * cold.get(n, 0.0) for n in names], 0.38, color=_COLOURS[1], label="first call")
        axes.set_yticks(places, [name.replace("_", " ") for name in names])
        axes.set_xlabel("ms")
        axes.legend()
    return svg()


def intervals(profile: Profile) -> str:
    """Milliseconds from token to token: the median over calls, and where the calls lie."""
    calls = [call["token_seconds"] for run in profile["runs"] for call in run["calls"]]
    shortest = min(map(len, calls))
    seconds = 1e3 * np.array([call[:shortest] for call in calls])
    tokens = np.arange(2, shortest + 2)
    enough = len(calls) >= samples_needed(10)
    low, high = np.percentile(seconds, (10, 90) if enough else (0, 100), axis=0)
    with _figure(2.4) as (figure, svg):
        axes = figure.subplots()
        label = "p10 to p90 of the calls" if enough else "all calls"
        axes.fill_between(tokens, low, high, color=_COLOURS[0], alpha=0.25, label=label)
        axes.plot(tokens, np.median(seconds, 0), color=_COLOURS[0], marker="." if shortest < 3 else "", label="median")
        axes.set_xlabel("token")
        axes.set_ylabel("ms")
        # One slow interval must not hide the others: it is beyond the edge, and in the tables.
        axes.set_ylim(0, 1.15 * float(np.percentile(seconds, 99)))
        axes.legend()
    return svg()


def roofline(profile: Profile) -> str:
    """Operations a second against operations a byte: the machine's limits, and every stage below them."""
    limits, stages_ = profile["limits"], profile["roofline"]
    bandwidth, rates = limits["read_bytes_per_second"], limits["flops_per_second"]
    found = [(s["flops"] / s["bytes"], s["flops"] / s["seconds"], s["stage"]) for s in stages_ if s["flops"]]
    ridges = [rate / bandwidth for rate in rates.values()]
    low, high = min([*ridges, *(x for x, _, _ in found)]) / 4, max([*ridges, *(x for x, _, _ in found)]) * 4
    x = np.geomspace(low, high, 100)
    with _figure(3.4) as (figure, svg):
        axes = figure.subplots()
        for n, (kind, rate) in enumerate(rates.items()):
            axes.loglog(x, np.minimum(rate, bandwidth * x) / _GIGA, color=_COLOURS[n], label=f"limit, {kind}")
        for n, (intensity, reached, stage) in enumerate(found):
            axes.plot(intensity, reached / _GIGA, "o", color=_COLOURS[(n + 2) % len(_COLOURS)])
            axes.annotate(stage.replace("_", " "), (intensity, reached / _GIGA), (5, -10), textcoords="offset points")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.set_xlabel("operations a byte read")
        axes.set_ylabel("billion operations a second")
        axes.legend(loc="lower right")
    return svg()


def memory(profile: Profile) -> str:
    """Megabytes: the measured peak and the prediction, of the same parts."""
    m = profile["memory"]
    predicted = m["predicted"]
    parts = {
        "base": (m["base"], m["base"]),
        "weights": (sum(m["weights"].values()), predicted["weights"]),
        "KV cache": (m["kv_cache"], predicted["kv_cache"]),
        "rest: activations, images": (m["rest"], predicted["activations"] + predicted["images"]),
    }
    return _stacked(parts, ["measured", "predicted"], "MB", 1 / _MEGA)


def power(profile: Profile) -> str:
    """Mean watts of every rail."""
    rails = profile["power"]["rails"]
    with _figure(0.35 * len(rails) + 0.8) as (figure, svg):
        axes = figure.subplots()
        axes.barh(list(rails)[::-1], [rail["watts"] for rail in rails.values()][::-1], color=_COLOURS[0])
        axes.set_xlabel("W")
    return svg()


def sweep(profiles: Sequence[Profile], titles: Sequence[str]) -> str:
    """Milliseconds of the stages of one call, one above the other, for every point."""
    names = list(dict.fromkeys(name for p in profiles for name in p["stages"]))
    medians = {name: [p["stages"].get(name, {"median": 0.0})["median"] for p in profiles] for name in names}
    longest = sorted(names, key=lambda name: -sum(medians[name]))[: len(_COLOURS) - 1]
    rest = [sum(medians[name][n] for name in names if name not in longest) for n in range(len(profiles))]
    parts = {name.replace("_", " "): medians[name] for name in names if name in longest} | {"others": rest}
    return _stacked(parts, titles, "ms", 1e3)


def _stacked(parts: Mapping[str, Sequence[float]], rows: Sequence[str], unit: str, scale: float) -> str:
    with _figure(0.4 * len(rows) + 1.2) as (figure, svg):
        axes = figure.subplots()
        left = np.zeros(len(rows))
        places = np.arange(len(rows))[::-1]
        for (name, values), colour in zip(parts.items(), _COLOURS, strict=False):
            widths = scale * np.asarray(values, np.float64)
            axes.barh(places, widths, 0.6, left=left, color=colour, label=name)
            left += widths
        axes.set_yticks(places, list(rows))
        axes.set_xlabel(unit)
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return svg()


def _whiskers(figures: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """Distances [2, stages] in ms from the medians to p10 and p90; none where the samples are too few."""
    reach = []
    for name in names:
        median, known = figures[name]["median"], figures[name]["percentiles"]
        reach.append((median - known.get("p10", median), known.get("p90", median) - median))
    return 1e3 * np.array(reach).T


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of `height` inches, and what gives its SVG text behind the block."""
    require()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    texts: list[str] = []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, lambda: texts[0]
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = out.getvalue()
    texts.append(drawing[drawing.index("<svg") :].replace(_INK, "currentColor"))
