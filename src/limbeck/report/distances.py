"""The charts of teacher hacking: how far the student is from its teacher and from the truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.report.charts import Chart, Series, line_chart


def hacking_charts(result: Mapping[str, Any]) -> list[Chart]:
    """Proxy and golden over the steps, and golden over proxy, which turns up where a teacher is hacked.

    Empty where a run measured neither.
    """
    found = result.get("hacking")
    if not found:
        return []
    steps, proxy, golden = (tuple(map(float, found[name])) for name in ("steps", "proxy", "golden"))
    over = [
        Series(name, css, (tuple(zip(steps, values, strict=True)),), marks=True)
        for name, css, values in (("proxy", "c0", proxy), ("golden", "c1", golden))
    ]
    plot = Series("golden over proxy", "student", (tuple(zip(proxy, golden, strict=True)),), marks=True)
    unit = f" {found['unit']}"
    drawn = (
        line_chart(
            "Distance from the teacher (proxy) and from the oracle (golden)", over, x_label="optimiser step",
            y_label=found["unit"], whole_x=True, unit=unit,
        ),
        line_chart(
            "Golden over proxy, from right to left as the training goes on", [plot], x_label="proxy",
            y_label=f"golden, {found['unit']}", y_range=(min(golden), max(golden)), unit=unit,
        ),
    )  # fmt: skip
    return [chart for chart in drawn if chart is not None]
