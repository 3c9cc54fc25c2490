"""Line plots as inline SVG. Axes and text use the page's colour (currentColor), so they suit light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#2a78b8", "#c8641e", "#3b8f5a", "#9553a8", "#b03a48")
_INK = "#010203"  # a placeholder, replaced by currentColor


def line_plot(
    series: Mapping[str, tuple[Sequence[Any], ...]], x: str, y: str, log: bool = False, zero: bool = False
) -> str:
    """A plot of named lines, each (xs, ys) or, with error bars, (xs, ys, lows, highs).

    In a name such as "diagnosis, repaired" the part before the comma determines the colour and the rest the stroke.
    Text as xs gives equally spaced categories.
    """
    from matplotlib import ticker

    strokes = ("-", "--", ":")
    colours: dict[str, str] = {}
    kinds = list(dict.fromkeys(name.partition(", ")[2] for name in series))
    for name in series:
        colours.setdefault(name.partition(", ")[0], COLOURS[len(colours) % len(COLOURS)])
    ticks: list[float] = []

    def draw(axes):
        for turn, (name, (xs, ys, *spread)) in enumerate(series.items()):
            colour, _, kind = name.partition(", ")
            look = {"color": colours[colour], "linestyle": strokes[kinds.index(kind) % 3], "linewidth": 1.6}
            if not spread:
                axes.plot(xs, ys, label=name, **look, **({"marker": "o", "markersize": 4} if len(xs) < 15 else {}))
                continue
            at = [float(place if isinstance(value, str) else value) for place, value in enumerate(xs)]
            # Shift the series a little against each other, so that error bars at one x do not overlap.
            step = 0.012 * max((max(at) - min(at)) if len(at) > 1 else max(at), 1e-9)
            shifted = [value + step * (turn - (len(series) - 1) / 2) for value in at]
            axes.errorbar(
                shifted,
                ys,
                yerr=error_bars(ys, *spread),
                label=name,
                fmt="o",
                markersize=4,
                capsize=2,
                elinewidth=1,
                **look,
            )
            if len(at) > len(ticks):
                ticks[:] = at
                axes.set_xticks(ticks, [value if isinstance(value, str) else f"{value:g}" for value in xs])
        axes.set(xlabel=x, ylabel=y)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        if zero:
            axes.set_ylim(0, None)
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=1 if kinds[1:] else 2)

    rows = len(series) if kinds[1:] else (len(series) + 1) // 2
    return _svg(draw, f"{x}|{y}|{list(series)}", height=2.6 + 0.2 * rows)


def error_bars(middle: Sequence[float], low: Sequence[float | None], high: Sequence[float | None]) -> list[list[float]]:
    """Lengths of the error bars below and above; 0 where there is no interval."""
    return [
        [0 if lo is None else max(0, m - lo) for m, lo in zip(middle, low, strict=True)],
        [0 if hi is None else max(0, hi - m) for m, hi in zip(middle, high, strict=True)],
    ]


def _svg(draw, salt: str, height: float) -> str:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    ink: dict[Any, str] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK
    )
    with matplotlib.rc_context(
        {"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, **ink}
    ):
        figure, axes = pyplot.subplots(figsize=(5.0, height), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(
        r'font-family: [^;"]*|font: ([\d.]+px) [^;"]*',
        lambda m: f"font: {m[1]} sans-serif" if m[1] else "font-family: sans-serif",
        svg,
    )
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1).replace(' width="', ' data-width="', 1)
