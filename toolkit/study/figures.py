"""The report's figures, made with plotly. Colours of text and grid are set by the page, for light and dark."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from toolkit.detector.robustness import PERTURBATIONS
from toolkit.study.answer import own_detection, quality_metric
from toolkit.study.compare import over_seeds
from toolkit.study.spec import CONTROL, REAL, STRANGERS

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


DASHES = ("solid", "dash", "dot", "dashdot")
UPSAMPLINGS = ("transposed", "nearest", "bilinear", "zero")


def split_label(label: str) -> tuple[str, str]:
    """``(activation, upsampling)`` of a label of the grid; the second is empty where upsampling is not varied."""
    name, comma, kind = label.rpartition(", ")
    return (name, kind) if comma and kind in UPSAMPLINGS else (label, "")


def _places(labels: list[str]) -> tuple[list[str], list[str]]:
    """The activations and the upsamplings of the labels, in order."""
    both = [split_label(label) for label in labels]
    return list(dict.fromkeys(a for a, _ in both)), list(dict.fromkeys(u for _, u in both))


def colours(labels: list[str]) -> dict[str, str]:
    """A colour for each label: that of its activation, by its place in the grid."""
    activations, _ = _places(labels)
    return {label: PALETTE[activations.index(split_label(label)[0]) % len(PALETTE)] for label in labels}


def _symbols(labels: list[str]) -> dict[str, str]:
    """A mark for each label: that of its upsampling where that is varied, or else its own."""
    _, kinds = _places(labels)
    if len(kinds) == 1:
        return {label: SYMBOLS[i % len(SYMBOLS)] for i, label in enumerate(labels)}
    return {label: SYMBOLS[kinds.index(split_label(label)[1])] for label in labels}


def _dashes(labels: list[str]) -> dict[str, str]:
    _, kinds = _places(labels)
    return {label: DASHES[kinds.index(split_label(label)[1])] for label in labels}


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
    metric = quality_metric(table)
    quality = table[(table["metric"] == metric) & (table["checkpoint"] != "best")]
    detection = own_detection(table)
    colour, symbols = colours(labels), _symbols(labels)
    figure = go.Figure()
    for label in labels:
        x = quality[quality["generator"] == label].groupby("seed")["value"].mean()
        y = detection[detection["generator"] == label].groupby("seed")["value"].mean()
        both = x.index.intersection(y.index)
        if not len(both):
            continue
        symbol = symbols[label]
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
            hovertemplate=f"{label}<br>{metric} %{{x:.3g}}<br>frame AUC %{{y:.3f}}<extra>mean of {len(both)} seed(s)</extra>",
        )
    floor = quality[quality["generator"] == REAL]["value"]
    if len(floor):
        figure.add_vline(
            x=float(floor.mean()),
            line={"dash": "dot", "color": "#888"},
            annotation={"text": "real against real", "font": {"color": "#888"}, "textangle": -90, "yanchor": "top"},
        )
    figure.add_hline(y=0.5, line={"dash": "dot", "color": "#888"}, annotation={"text": "chance", "font": {"color": "#888"}})
    figure.update_xaxes(title=f"{metric} to real training frames (better to the left)")
    figure.update_yaxes(title="frame AUC of its detector", range=[min(0.45, float(detection["value"].min()) - 0.05), 1.05])
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
            textfont={"size": 12 if len(shown.index) < 9 else 10},
            xgap=1,
            ygap=1,
            hovertemplate="trained on %{y}<br>tested on %{x}<br>frame AUC %{z:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="tested on fakes of", side="bottom", tickangle=-40)
    figure.update_yaxes(title="trained on fakes of", autorange="reversed")
    return _layout(figure, 180 + (44 if len(shown.index) < 9 else 30) * max(3, len(shown.index)))


def measures(table: pd.DataFrame, labels: list[str]) -> go.Figure:
    """One panel per measure: every generator's mean and interval over seeds, with the real clips' own figure."""
    rows = table[table["generator"].isin(labels) & (table["checkpoint"] != "best")]
    names = list(dict.fromkeys(rows["metric"]))
    columns = 2
    activations, kinds = _places(labels)
    figure = make_subplots(
        rows=-(-len(names) // columns),
        cols=columns,
        subplot_titles=[_title(rows, name) for name in names],
        shared_yaxes=True,
        vertical_spacing=min(0.12, 0.35 / max(1, len(names) // columns)),
        horizontal_spacing=0.06,
    )
    colour, symbols = colours(labels), _symbols(labels)
    for place, name in enumerate(names):
        row, column = place // columns + 1, place % columns + 1
        for label in labels:
            values = rows[(rows["metric"] == name) & (rows["generator"] == label)]["value"]
            figure_ = over_seeds(values)
            activation, kind = split_label(label)
            # Upsamplings of one activation share its line, a little apart.
            y = activations.index(activation) + (kinds.index(kind) - (len(kinds) - 1) / 2) * 0.24
            figure.add_scatter(
                x=[figure_[0]],
                y=[y],
                mode="markers",
                showlegend=False,
                row=row,
                col=column,
                marker={"color": colour[label], "size": 9, "symbol": symbols[label] if len(kinds) > 1 else "circle"},
                error_x={"type": "data", "array": [_error(figure_)], "thickness": 1.5},
                hovertemplate=f"{label}: %{{x:.4g}}<extra>mean of {figure_[3]} seed(s)</extra>",
            )
            figure.add_scatter(
                x=values.tolist(),
                y=[y] * len(values),
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
    figure.update_yaxes(range=[len(activations) - 0.4, -0.6], tickvals=list(range(len(activations))), ticktext=activations, zeroline=False)
    figure.update_annotations(font_size=12)
    return _layout(figure, 90 + (90 + (24 if len(kinds) == 1 else 14 * len(kinds)) * len(activations)) * -(-len(names) // columns))


def _title(rows: pd.DataFrame, name: str) -> str:
    first = rows[rows["metric"] == name].iloc[0]
    unit = f" [{first['unit']}]" if first["unit"] else ""
    return f"{name}{unit} ({'like real' if first['better'] == 'real' else first['better']} is better)"


def learning_curves(cells: list[tuple[dict[str, Any], dict[str, Any]]], labels: list[str]) -> go.Figure:
    """Fréchet distance to validation frames while the GANs train: mean over seeds, and the seeds' range."""
    colour, dashes = colours(labels), _dashes(labels)
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
            line={"color": colour[label], "dash": dashes[label]},
        )
    figure.update_xaxes(title="generator updates")
    figure.update_yaxes(title="Fréchet distance to validation frames", type="log")
    return _layout(figure, 420, legend={"orientation": "h", "y": -0.22})


# Measure -> (what the menu calls it, whether colours follow its logarithm, the range of colours).
HEALTH: dict[str, tuple[str, bool, tuple[float, float] | None]] = {
    "gradient_norm": ("gradient norm", True, None),
    "dead": ("share of dead units", False, (0.0, 1.0)),
    "dormant_0.025": ("share of dormant units (tau 0.025)", False, (0.0, 1.0)),
    "dormant_0.1": ("share of dormant units (tau 0.1)", False, (0.0, 1.0)),
    "saturated": ("share of saturated inputs", False, (0.0, 1.0)),
    "effective_rank": ("effective rank", False, None),
    "update_ratio": ("update-to-weight ratio of the layers", True, None),
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
    names = [name for name in HEALTH if name in set(table["measure"])]
    figure = go.Figure()
    for place, name in enumerate(names):
        _, logarithmic, limits = HEALTH[name]
        of_measure = table[table["measure"] == name]
        sites = list(dict.fromkeys(of_measure["site"]))
        wide = of_measure.pivot_table(index="label", columns="site", values="value", aggfunc="mean")
        values = wide.reindex(index=labels, columns=sites).to_numpy(dtype=float)
        shown = np.log10(np.maximum(values, 1e-12)) if logarithmic else values
        text = [["" if np.isnan(v) else f"{v:.2g}" for v in row] for row in values]
        figure.add_heatmap(
            z=shown.tolist(),
            x=sites,
            y=labels,
            text=text,
            texttemplate="%{text}",
            visible=place == 0,
            colorscale="Viridis",
            colorbar={"thickness": 12, "title": {"text": "log10" if logarithmic else "share" if limits else ""}},
            textfont={"size": 11},
            zmin=limits[0] if limits else None,
            zmax=limits[1] if limits else None,
            xgap=1,
            ygap=1,
            hovertemplate="%{y}<br>%{x}<br>%{text}<extra></extra>",
        )
    buttons = [{"label": HEALTH[name][0], "method": "restyle", "args": ["visible", [n == name for n in names]]} for name in names]
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "pad": {"b": 8}}])
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickangle=-40)
    return _layout(figure, 220 + (34 if len(labels) < 9 else 22) * len(labels))


def robustness(curves: pd.DataFrame, labels: list[str]) -> go.Figure:
    """Frame AUC of detectors on spoiled test frames: one panel per perturbation.

    Args:
        curves: rows ``label, perturbation, level, metric, value, low, high``, one or several (seeds) for each.
        labels: the generators whose fakes the detectors were trained on, in the grid's order.
    """
    rows = curves[curves["metric"] == "frame auc"]
    untouched = rows[rows["perturbation"] == "none"]
    names = [p for p in dict.fromkeys(rows["perturbation"]) if p != "none"]
    units = {p.name: p.unit for p in PERTURBATIONS}
    columns = 2
    figure = make_subplots(
        rows=-(-len(names) // columns),
        cols=columns,
        subplot_titles=[f"{name} ({units.get(name, '')})" for name in names],
        shared_yaxes=True,
        vertical_spacing=0.14,
        horizontal_spacing=0.05,
    )
    colour, dashes = colours(labels), _dashes(labels)
    several = len(labels) > 1
    for place, name in enumerate(names):
        where = {"row": place // columns + 1, "col": place % columns + 1}
        part = pd.concat([untouched, rows[rows["perturbation"] == name]])
        ticks = ["untouched", *(f"{v:g}" for v in dict.fromkeys(part.loc[part["perturbation"] == name, "level"]))]
        part = part.assign(tick=np.where(part["perturbation"] == "none", "untouched", part["level"].map("{:g}".format)))
        mean = part.groupby("tick")[["value", "low", "high"]].mean().reindex(ticks)
        base = "#888888" if several else colour[labels[0]]
        figure.add_scatter(
            x=[*ticks, *ticks[::-1]],
            y=[*mean["high"], *mean["low"][::-1]],
            fill="toself",
            mode="lines",
            line={"width": 0},
            fillcolor=_rgba(base, 0.25),
            showlegend=False,
            hoverinfo="skip",
            **where,
        )
        for label in labels if several else ():
            own = part[part["label"] == label].groupby("tick")[["value", "low", "high"]].mean().reindex(ticks)
            figure.add_scatter(
                x=ticks,
                y=own["value"].tolist(),
                customdata=own[["low", "high"]].to_numpy().tolist(),
                mode="lines",
                name=label,
                legendgroup=label,
                showlegend=place == 0,
                line={"color": colour[label], "dash": dashes[label], "width": 1.5},
                hovertemplate=f"{label}<br>%{{x}}: %{{y:.3f}} (%{{customdata[0]:.3f}} to %{{customdata[1]:.3f}})<extra></extra>",
                **where,
            )
        figure.add_scatter(
            x=ticks,
            y=mean["value"].tolist(),
            mode="lines+markers",
            name="mean of all" if several else labels[0],
            legendgroup="mean",
            showlegend=place == 0,
            line={"color": base, "width": 3},
            hovertemplate="%{x}: %{y:.3f}<extra></extra>",
            **where,
        )
        figure.add_hline(y=0.5, line={"dash": "dot", "color": "#888"}, **where)
    figure.update_xaxes(type="category")
    low = float(np.nanmin([rows["value"].min(), 0.45]))
    figure.update_yaxes(range=[low - 0.05, 1.02], title="frame AUC", col=1)
    figure.update_annotations(font_size=12)
    return _layout(figure, 120 + 230 * -(-len(names) // columns), legend={"orientation": "h", "y": -0.12})


def robust_labels(table: pd.DataFrame, labels: list[str]) -> list[str]:
    """The labels that have any figure, in the grid's order."""
    present = set(table["generator"]) | set(table["trained_on"]) - {CONTROL}
    return [label for label in labels if label in present]
