"""The curve as a picture, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdedit.apps.evaluation.curve import Row
from sdedit.files import write_atomically

_REALISM = "kernel distance on wavelet features\n(not KID; small is real)"
_FAITHFULNESS = "L2 distance from the guide\n(small is faithful)"


def plot_curve(curves: Mapping[str, Sequence[Row]], path: str | Path) -> None:
    """Draw realism and faithfulness over strength, and against each other.

    Args:
        curves: Rows of `evaluate` by name; guides and the VAE's floor are drawn from the first.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the plot needs matplotlib: pip install 'sdedit[plot]'") from error
    figure = Figure((12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    real, faithful, both = figure.subplots(1, 3)
    for number, (name, rows) in enumerate(curves.items()):
        drawn = [row for row in rows if row.what == "drawn"]
        style: dict[str, Any] = {"color": f"C{number}", "label": name, "marker": "o", "markersize": 4, "capsize": 2}
        strengths, l2 = [row.strength for row in drawn], [row.l2 for row in drawn]
        distance, across, up = _distances(drawn), _bars(drawn, "l2"), _bars(drawn, "wavelet_kernel_distance")
        real.errorbar(strengths, distance, up, **style)
        faithful.errorbar(strengths, l2, across, **style)
        both.errorbar(l2, distance, up, across, **style)
        labelled = -1e9
        for row in drawn:  # where they are too close to be read, some go without
            if row.l2 > labelled + 0.1 * max(l2):
                both.annotate(f" {row.strength:g}", (row.l2, row.wavelet_kernel_distance), fontsize=7, va="bottom")
                labelled = row.l2
    for row in next(iter(curves.values())):
        if row.what == "guides":
            both.plot(row.l2, row.wavelet_kernel_distance, "k*", markersize=9, label="the guides as they are")
        elif row.what != "drawn":
            for axes in (real, both):
                axes.axhline(row.wavelet_kernel_distance, color="0.6", linestyle=":", label=row.what)
    real.set(xlabel="strength", ylabel=_REALISM)
    faithful.set(xlabel="strength", ylabel=_FAITHFULNESS)
    both.set(xlabel=_FAITHFULNESS, ylabel=_REALISM)
    both.legend(frameon=False, fontsize=8)
    for axes in (real, faithful, both):
        axes.spines[["top", "right"]].set_visible(False)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _distances(rows: Sequence[Row]) -> list[float]:
    return [row.wavelet_kernel_distance for row in rows]


def _bars(rows: Sequence[Row], name: str) -> list[list[float]]:
    """Lengths of error bars below and above, as matplotlib takes them."""
    values = [(getattr(row, name), getattr(row, f"{name}_low"), getattr(row, f"{name}_high")) for row in rows]
    return [[max(v - low, 0) for v, low, _ in values], [max(high - v, 0) for v, _, high in values]]
