"""The errors of a quantization by layer, as a picture."""

from collections.abc import Mapping
from pathlib import Path

__all__ = ["draw_errors"]

Errors = Mapping[str, Mapping[str, tuple[float, float]]]


def draw_errors(layers: Errors, path: Path) -> None:
    """A PNG with a panel for each component: each layer's relative error, and that of rounding to nearest.

    `layers`: component → layer → (error, error of rounding). Raises ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {component: found for component, found in layers.items() if found}
    widest = max((len(found) for found in shown.values()), default=1)
    figure = Figure(figsize=(min(6 + widest / 8, 24), 2.6 * max(len(shown), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (component, found) in enumerate(shown.items()):
        axes = figure.add_subplot(len(shown), 1, i + 1)
        places = range(len(found))
        axes.plot(places, [100 * nearest for _, nearest in found.values()], "o", ms=3, color="0.6", label="rounded")
        axes.plot(places, [100 * error for error, _ in found.values()], "o", ms=3, color="C0", label="calibrated")
        axes.set_title(component.replace("_", " "), loc="left", fontsize=9)
        axes.set_ylabel("error of the output, %")
        axes.set_ylim(0, 110 * max(max(errors) for errors in found.values()))
        axes.set_xticks(places, list(found), rotation=90, fontsize=5)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
