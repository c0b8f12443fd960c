"""The report's figures, made with plotly. Colours of text and grid are set by the page, for light and dark."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.study.answer import QUALITY, own_detection
from toolkit.study.spec import CONTROL, REAL, STRANGERS
from toolkit.study.table import over_seeds

# Okabe & Ito's palette, told apart with any colour vision; then shades for larger grids.
PALETTE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#8C6BB1",
    "#B2A400",
    "#7F7F7F",
    "#A65628",
    "#4DAF4A",
    "#F781BF",
)
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "cross",
    "x",
    "star",
    "hexagon",
    "pentagon",
    "bowtie",
    "hourglass",
)


def colours(labels: list[str]) -> dict[str, str]:
    """One colour per label, by its place in the grid."""
    return {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(labels)}


def _rgba(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _layout(figure: go.Figure, height: int, **keywords: Any) -> go.Figure:
    figure.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 40, "b": 55},
        font={"family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"font": {"family": "system-ui, sans-serif"}},
        **keywords,
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def _error(figure: tuple[float, float, float, int]) -> float | None:
    return figure[2] - figure[0] if np.isfinite(figure[2]) else None


def quality_against_detectability(table: pd.DataFrame, labels: list[str]) -> go.Figure:
    """One large mark per generator (mean over seeds) and a small one per seed."""
    quality = table[table["metric"] == QUALITY]
    detection = own_detection(table)
    colour = colours(labels)
    figure = go.Figure()
    for i, label in enumerate(labels):
        x = quality[quality["generator"] == label].groupby("seed")["value"].mean()
        y = detection[detection["generator"] == label].groupby("seed")["value"].mean()
        both = x.index.intersection(y.index)
        if not len(both):
            continue
        symbol = SYMBOLS[i % len(SYMBOLS)]
        figure.add_scatter(
            x=x[both].tolist(),
            y=y[both].tolist(),
            mode="markers",
            showlegend=False,
            legendgroup=label,
            hoverinfo="text",
            text=[f"{label}, seed {s}" for s in both],
            marker={"color": _rgba(colour[label], 0.45), "size": 8, "symbol": symbol},
        )
        figure.add_scatter(
            x=[float(x[both].mean())],
            y=[float(y[both].mean())],
            mode="markers",
            name=label,
            legendgroup=label,
            marker={"color": colour[label], "size": 16, "symbol": symbol, "line": {"width": 1, "color": "white"}},
            hovertemplate=f"{label}<br>{QUALITY} %{{x:.3g}}<br>frame AUC %{{y:.3f}}<extra>mean of {len(both)} seed(s)</extra>",
        )
    floor = quality[quality["generator"] == REAL]["value"]
    if len(floor):
        figure.add_vline(
            x=float(floor.mean()),
            line={"dash": "dot", "color": "#888"},
            annotation={"text": "real against real", "font": {"color": "#888"}, "textangle": -90, "yanchor": "top"},
        )
    figure.add_hline(y=0.5, line={"dash": "dot", "color": "#888"}, annotation={"text": "chance", "font": {"color": "#888"}})
    figure.update_xaxes(title=f"{QUALITY} to real training frames (better to the left)")
    figure.update_yaxes(title="frame AUC of its detector")
    return _layout(figure, 460, legend={"orientation": "h", "y": -0.22})


def transfer_matrix(matrix: pd.DataFrame, labels: list[str]) -> go.Figure:
    """Frame AUC by training generator (rows) and test generator (columns), mean over seeds."""
    shown = matrix.reindex(index=[v for v in labels if v in matrix.index], columns=[v for v in labels if v in matrix.columns])
    values = shown.to_numpy(dtype=float)
    text = [["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values]
    figure = go.Figure(
        go.Heatmap(
            z=values.tolist(),
            x=list(shown.columns),
            y=list(shown.index),
            text=text,
            texttemplate="%{text}",
            zmin=0.0,
            zmax=1.0,
            zmid=0.5,
            colorscale=[[0, "#2166AC"], [0.5, "#F7F7F7"], [1, "#B2182B"]],
            colorbar={"title": {"text": "AUC"}, "thickness": 12},
            textfont={"size": 12},
            xgap=1,
            ygap=1,
            hovertemplate="trained on %{y}<br>tested on %{x}<br>frame AUC %{z:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="tested on fakes of", side="bottom", tickangle=-40)
    figure.update_yaxes(title="trained on fakes of", autorange="reversed")
    return _layout(figure, 180 + 44 * max(3, len(shown.index)))


def measures(table: pd.DataFrame, labels: list[str]) -> go.Figure:
    """One panel per measure: every generator's mean and interval over seeds, with the real clips' own figure."""
    rows = table[table["generator"].isin(labels)]
    names = list(dict.fromkeys(rows["metric"]))
    columns = 2
    figure = make_subplots(
        rows=-(-len(names) // columns),
        cols=columns,
        subplot_titles=[_title(rows, name) for name in names],
        shared_yaxes=True,
        vertical_spacing=min(0.12, 0.35 / max(1, len(names) // columns)),
        horizontal_spacing=0.06,
    )
    colour = colours(labels)
    for place, name in enumerate(names):
        row, column = place // columns + 1, place % columns + 1
        for label in labels:
            values = rows[(rows["metric"] == name) & (rows["generator"] == label)]["value"]
            figure_ = over_seeds(values)
            figure.add_scatter(
                x=[figure_[0]],
                y=[label],
                mode="markers",
                showlegend=False,
                row=row,
                col=column,
                marker={"color": colour[label], "size": 10},
                error_x={"type": "data", "array": [_error(figure_)], "thickness": 1.5},
                hovertemplate=f"{label}: %{{x:.4g}}<extra>mean of {figure_[3]} seed(s)</extra>",
            )
            figure.add_scatter(
                x=values.tolist(),
                y=[label] * len(values),
                mode="markers",
                showlegend=False,
                row=row,
                col=column,
                hoverinfo="skip",
                marker={"color": _rgba(colour[label], 0.5), "size": 6, "symbol": "line-ns-open"},
            )
        # An interval of two seeds can be many times as wide as everything else: the points decide what is in view.
        points = rows[rows["metric"] == name]["value"].dropna().tolist()
        first = rows[rows["metric"] == name].iloc[0]
        # Distances: the same people, real against real. What should be like real: all real clips.
        floor = table[(table["metric"] == name) & (table["generator"] == REAL)]["value"].dropna()
        if first["better"] == "real":
            others = table[(table["metric"] == name) & (table["generator"] == STRANGERS)]["value"].dropna()
            for value in others:
                figure.add_vline(x=float(value), line={"dash": "dashdot", "color": "#bbb"}, row=row, col=column)
        if len(floor):
            points.append(float(floor.iloc[0]))
            figure.add_vline(x=float(floor.iloc[0]), line={"dash": "dot", "color": "#888"}, row=row, col=column)
        if points:
            room = 0.15 * (max(points) - min(points)) or 0.1
            figure.update_xaxes(range=[min(points) - room, max(points) + room], row=row, col=column)
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=labels)
    figure.update_annotations(font_size=12)
    return _layout(figure, 90 + (90 + 24 * len(labels)) * -(-len(names) // columns))


def _title(rows: pd.DataFrame, name: str) -> str:
    first = rows[rows["metric"] == name].iloc[0]
    unit = f" [{first['unit']}]" if first["unit"] else ""
    return f"{name}{unit} ({'like real' if first['better'] == 'real' else first['better']} is better)"


def learning_curves(cells: list[tuple[dict[str, Any], dict[str, Any]]], labels: list[str]) -> go.Figure:
    """Fréchet distance to validation frames while the GANs train: mean over seeds, and the seeds' range."""
    colour = colours(labels)
    figure = go.Figure()
    for label in labels:
        rows = [
            (step, value)
            for cell, result in cells
            if cell["kind"] == "gan" and cell["label"] == label
            for step, name, value in result["curves"]
            if name == "val/frechet"
        ]
        if not rows:
            continue
        curve = pd.DataFrame(rows, columns=["step", "value"]).groupby("step")["value"].agg(["mean", "min", "max"])
        steps = curve.index.tolist()
        figure.add_scatter(
            x=[*steps, *steps[::-1]],
            y=[*curve["max"], *curve["min"][::-1]],
            fill="toself",
            mode="lines",
            line={"width": 0},
            fillcolor=_rgba(colour[label], 0.15),
            showlegend=False,
            legendgroup=label,
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=steps,
            y=curve["mean"].tolist(),
            mode="lines+markers",
            name=label,
            legendgroup=label,
            line={"color": colour[label]},
        )
    figure.update_xaxes(title="generator updates")
    figure.update_yaxes(title="Fréchet distance to validation frames", type="log")
    return _layout(figure, 420, legend={"orientation": "h", "y": -0.22})


HEALTH = {
    "gradient_norm": "gradient norm",
    "dead": "share of dead units",
    "dormant_0.025": "share of dormant units (tau 0.025)",
    "dormant_0.1": "share of dormant units (tau 0.1)",
    "saturated": "share of saturated inputs",
}


def health(cells: list[tuple[dict[str, Any], dict[str, Any]]], labels: list[str]) -> go.Figure | None:
    """Health per site over the last quarter of the training, mean over seeds; a menu chooses the measure."""
    rows = []
    for cell, result in cells:
        if cell["kind"] != "gan" or not result.get("health"):
            continue
        last = max(step for step, *_ in result["health"])
        rows += [(cell["label"], site, m, v) for step, site, m, v in result["health"] if step >= 0.75 * last]
    if not rows:
        return None
    table = pd.DataFrame(rows, columns=["label", "site", "measure", "value"])
    sites = list(dict.fromkeys(table["site"]))
    names = [name for name in HEALTH if name in set(table["measure"])]
    figure = go.Figure()
    for place, name in enumerate(names):
        wide = table[table["measure"] == name].pivot_table(index="label", columns="site", values="value", aggfunc="mean")
        values = wide.reindex(index=labels, columns=sites).to_numpy(dtype=float)
        shown = np.log10(np.maximum(values, 1e-12)) if name == "gradient_norm" else values
        text = [["" if np.isnan(v) else f"{v:.2g}" for v in row] for row in values]
        bar = {"thickness": 12, "title": {"text": "log10" if name == "gradient_norm" else "share"}}
        figure.add_heatmap(
            z=shown.tolist(),
            x=sites,
            y=labels,
            text=text,
            texttemplate="%{text}",
            visible=place == 0,
            colorscale="Viridis",
            colorbar=bar,
            textfont={"size": 11},
            zmin=None if name == "gradient_norm" else 0,
            zmax=None if name == "gradient_norm" else 1,
            xgap=1,
            ygap=1,
            hovertemplate="%{y}<br>%{x}<br>%{text}<extra></extra>",
        )
    buttons = [{"label": HEALTH[name], "method": "restyle", "args": ["visible", [n == name for n in names]]} for name in names]
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "pad": {"b": 8}}])
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickangle=-40)
    return _layout(figure, 220 + 34 * len(labels))


def robust_labels(table: pd.DataFrame, labels: list[str]) -> list[str]:
    """The labels that have any figure, in the grid's order."""
    present = set(table["generator"]) | set(table["trained_on"]) - {CONTROL}
    return [label for label in labels if label in present]
