"""The report's charts as static SVG: no script, no network, text in the page's own colour, be it light or dark.

Each function takes plain rows and returns safe markup. Knows nothing of tables, stages or stores.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import altair as alt
import polars as pl
from markupsafe import Markup

Rows = Sequence[dict[str, Any]]

# Told apart by every common kind of colour blindness (Okabe and Ito), and mid-tone: readable on white and on black.
BLUE, ORANGE, GREEN, RED, GREY = "#3a86c8", "#d98a16", "#2f9e78", "#cf5b2e", "#8b929c"
VERDICTS = {"grounded": BLUE, "unsupported": RED, "not_visual": GREY}
INK = "currentColor"


def svg(chart: Any) -> Markup:
    """The chart as inline SVG; ids are made distinct, because several charts share one page."""
    config = chart.configure(
        background="transparent",
        font="sans-serif",
        axis=alt.AxisConfig(
            labelColor=INK, titleColor=INK, domainColor=GREY, tickColor=GREY, gridColor=GREY, gridOpacity=0.25,
            labelFontSize=11, titleFontSize=11, titleFontWeight="normal", labelLimit=240,
        ),
        legend=alt.LegendConfig(labelColor=INK, titleColor=INK, orient="top", title=None, labelFontSize=11),
        title=alt.TitleConfig(color=INK, fontSize=12, anchor="start"),
        view=alt.ViewConfig(stroke=None),
    )  # fmt: skip
    text = io.StringIO()
    config.save(text, format="svg")
    drawn = text.getvalue()
    prefix = f"c{sha256(drawn.encode()).hexdigest()[:8]}-"
    drawn = drawn[drawn.index("<svg") :].replace(' id="', f' id="{prefix}').replace("url(#", f"url(#{prefix}")
    return Markup(drawn)  # noqa: S704 - drawn by Vega, which escapes the text it is given


def _frame(rows: Rows) -> pl.DataFrame:
    return pl.DataFrame(rows, infer_schema_length=None)


def intervals(panels: Sequence[tuple[str, float | None, Rows]], order: Sequence[str]) -> Markup:
    """One panel per metric (title, chance level, rows of scorer, value, low, high): points with interval bars."""
    drawn = []
    for number, (title, chance, rows) in enumerate(panels):
        axis = alt.Axis(title=None, labels=number == 0, ticks=False, domain=False)
        y = alt.Y("scorer:N", sort=list(order), axis=axis)
        colour = alt.condition("datum.scorer == 'model'", alt.value(BLUE), alt.value(GREY))
        base = alt.Chart(_frame(rows)).encode(y=y, color=colour)
        scale = alt.Scale(zero=False, nice=True)
        bars = base.mark_rule(strokeWidth=2.5).encode(
            x=alt.X("low:Q", title=None, scale=scale, axis=alt.Axis(tickCount=4, labelFlush=False)), x2="high:Q"
        )
        points = base.mark_point(filled=True, size=80, opacity=1).encode(x="value:Q")
        layers = [bars, points]
        if chance is not None:
            line = alt.Chart(_frame([{"chance": chance}])).mark_rule(color=ORANGE, strokeDash=[4, 3], strokeWidth=1.5)
            layers.insert(0, line.encode(x="chance:Q"))
        drawn.append(alt.layer(*layers).properties(title=title, width=215, height=26 * len(order)))
    return svg(alt.hconcat(*drawn, spacing=26))


def lines(rows: Rows, y_title: str) -> Markup:
    """Rows of step, value, series: one line per series."""
    frame = _frame(rows)
    names = frame["series"].unique(maintain_order=True).to_list()
    colours = alt.Scale(domain=names, range=[BLUE, ORANGE, GREEN, RED, GREY][: max(1, len(names))])
    mark = alt.Chart(frame).mark_line(point=alt.OverlayMarkDef(size=22), strokeWidth=2)
    encoded = mark.encode(
        x=alt.X("step:Q", title="training step", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(zero=False, nice=False)),
        y=alt.Y("value:Q", title=y_title, scale=alt.Scale(zero=False)),
        color=alt.Color("series:N", scale=colours, legend=alt.Legend() if len(names) > 1 else None),
    )
    return svg(encoded.properties(width=360, height=190))


def reliability(rows: Rows) -> Markup:
    """Rows of series, predicted, observed, low, high: observed share of likes against the predicted probability."""
    frame = _frame(rows)
    names = frame["series"].unique(maintain_order=True).to_list()
    scale = alt.Scale(domain=[0, 1])
    ideal = alt.Chart(_frame([{"x": 0.0, "y": 0.0}, {"x": 1.0, "y": 1.0}])).mark_line(color=GREY, strokeDash=[4, 3])
    base = alt.Chart(frame).encode(
        x=alt.X("predicted:Q", scale=scale, title="predicted probability"),
        color=alt.Color("series:N", scale=alt.Scale(domain=names, range=[ORANGE, BLUE][: len(names)])),
    )
    bars = base.mark_rule(strokeWidth=1.5, opacity=0.7).encode(
        y=alt.Y("low:Q", scale=scale, title="share that was the choice"), y2="high:Q"
    )
    points = base.mark_point(filled=True, opacity=1, size=55).encode(y="observed:Q")
    return svg(alt.layer(ideal.encode(x="x:Q", y="y:Q"), bars, points).properties(width=300, height=260))


def histogram(rows: Rows, title: str, expected: float | None = None) -> Markup:
    """Rows of start, stop, n, verdict: stacked bars; `expected` is the height every bar would have by chance."""
    frame = _frame(rows)
    names = [name for name in VERDICTS if name in set(frame["verdict"])]
    colours = alt.Scale(domain=names, range=[VERDICTS[name] for name in names])
    bars = alt.Chart(frame).mark_bar(binSpacing=1).encode(
        x=alt.X("start:Q", title=title, bin=alt.BinParams(binned=True)),
        x2="stop:Q",
        y=alt.Y("n:Q", title="claims"),
        color=alt.Color("verdict:N", scale=colours),
    )  # fmt: skip
    layers: list[Any] = [bars]
    if expected is not None:
        line = alt.Chart(_frame([{"expected": expected}])).mark_rule(color=ORANGE, strokeDash=[4, 3], strokeWidth=1.5)
        layers.append(line.encode(y="expected:Q"))
    return svg(alt.layer(*layers).properties(width=350, height=190))
