"""A comparison as a picture: a point for each seed, the mean, and its interval."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from limbeck.errors import ConfigError, shown
from limbeck.report import figures
from limbeck.report.figures import Figure

if TYPE_CHECKING:
    from limbeck.report.compare import Comparison, Method

KINDS = (".png", ".svg", ".pdf")
# The panels, where the runs have them.
PANELS = (
    figures.PERPLEXITY,
    figures.ACCURACY,
    figures.AVERAGE,
    figures.JUST_LEARNED,
    figures.forgetting("cdl"),
    figures.AGREEMENT,
    figures.NLL,
)
MOST_PANELS = 3
BLUE, GREY = "#0b69b7", "#5a6170"


def draw(comparison: Comparison, path: Path) -> Path:
    """Draw ``comparison`` into ``path``; the format follows its suffix.

    Raises:
        ConfigError: another suffix than ``.png``, ``.svg`` or ``.pdf``.
    """
    if path.suffix.lower() not in KINDS:
        raise ConfigError(
            f"plot {str(path)!r} has the suffix {path.suffix!r}: allowed are {', '.join(KINDS)}"
        )
    have = {figure.path for figure in comparison.figures}
    panels = [figure for figure in PANELS if figure.path in have][:MOST_PANELS]
    rows = len(comparison.methods)
    # A fixed salt and no date: equal runs give an equal file. Text stays text.
    with rc_context({"svg.hashsalt": "limbeck", "svg.fonttype": "none", "font.size": 10}):
        canvas = Canvas(figsize=(2.2 + 3.0 * len(panels), 1.3 + 0.42 * rows), layout="constrained")
        axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, figure in zip(axes, panels, strict=True):
            _panel(axis, comparison, figure)
        axes[0].set_yticks(range(rows), [shown(m.label) for m in comparison.methods], parse_math=False)
        axes[0].set_ylim(rows - 0.5, -0.5)
        canvas.suptitle("points: seeds; bar: mean and its 95 % interval (t)", fontsize=9, color=GREY)
        kind = path.suffix.lower().removeprefix(".")
        fresh = path.with_name(f".{path.name}.new")
        canvas.savefig(fresh, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    os.replace(fresh, path)
    return path


def _panel(axis: Axes, comparison: Comparison, figure: Figure) -> None:
    unit = {"%": ", %", "points": ", points", "nats": ", nats"}.get(figure.unit, "")
    better = {"higher": "more is better", "lower": "less is better"}.get(figure.better, "")
    axis.set_title(f"{figure.label}{unit}", fontsize=10, loc="left")
    axis.set_xlabel(better, fontsize=9, color=GREY)
    axis.grid(axis="x", color="#dedbd2", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    for row, method in enumerate(comparison.methods):
        _method(axis, method, figure, row)
        if method.label == comparison.baseline and figure.path in method.spreads:
            axis.axvline(method.spreads[figure.path].mean, color=GREY, linewidth=1, linestyle="--")


def _method(axis: Axes, method: Method, figure: Figure, row: int) -> None:
    spread = method.spreads.get(figure.path)
    if spread is None:
        return
    seeds = sorted(spread.values)
    offset = np.linspace(-0.16, 0.16, len(seeds)) if len(seeds) > 1 else np.zeros(1)
    axis.scatter(
        [spread.values[seed] for seed in seeds], row + offset, s=14, color=BLUE, alpha=0.45, linewidths=0
    )
    if spread.interval is not None:
        axis.plot(spread.interval, (row, row), color=BLUE, linewidth=2, solid_capstyle="butt")
    axis.plot(spread.mean, row, marker="D", markersize=6, color=BLUE, markeredgecolor="white")
