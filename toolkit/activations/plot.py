"""Plots of an activation and its derivative: in braille for a terminal, as a picture for everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toolkit.activations.properties import derivatives
from toolkit.errors import UserError
from toolkit.files import atomic

SUFFIXES = (".png", ".svg", ".pdf", ".html")
# Of the dots in a braille character, by row and column (Unicode 6.1, chart U2800).
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def curves(function: Callable[[Tensor], Tensor], span: tuple[float, float], points: int = 801) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``x``, the function and its derivative at evenly spaced points, in float64; NaN where one is not finite."""
    x = torch.linspace(*span, points, dtype=torch.float64)
    found = [derivatives(function, x, order) for order in (0, 1)]
    y, slope = (np.where(np.isfinite(v.numpy()), v.numpy(), np.nan) for v in found)
    return x.numpy(), y, slope


def braille(x: np.ndarray, lines: list[np.ndarray], width: int = 60, height: int = 11) -> list[str]:
    """Curves over one pair of axes as text, each character 2 x 4 dots.

    Args:
        x: ``(N,)``, increasing.
        lines: values over ``x``; NaN leaves a gap.
        width, height: of the plot in characters, labels not counted.

    Returns:
        The lines of text, with the ends of both axes written at them.
    """
    values = np.concatenate(lines)
    values = values[np.isfinite(values)]
    if not len(values):
        return ["nothing here is finite"]
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    dots = np.zeros((4 * height, 2 * width), bool)

    def row(value: float | np.ndarray) -> np.ndarray:
        return np.rint((high - np.asarray(value)) / (high - low) * (4 * height - 1)).astype(int)

    columns = np.arange(2 * width)
    at = x[0] + columns / (2 * width - 1) * (x[-1] - x[0])
    if low <= 0 <= high:
        dots[row(0.0), ::4] = True
    if x[0] <= 0 <= x[-1]:
        dots[::4, int(np.rint(-x[0] / (x[-1] - x[0]) * (2 * width - 1)))] = True
    for line in lines:
        found = np.interp(at, x, line)
        before: int | None = None
        for column in columns:
            if not np.isfinite(found[column]):
                before = None
                continue
            here = int(row(found[column]))
            first, last = (here, here) if before is None else sorted((before, here))
            # A steep piece is drawn as a stroke, so that the curve has no holes.
            dots[first : last + 1 if before is None or abs(here - before) < 2 else last, column] = True
            dots[here, column] = True
            before = here
    codes = 0x2800 + (dots.reshape(height, 4, width, 2) * _DOTS[None, :, None, :]).sum(axis=(1, 3))
    labels = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"]
    margin = max(map(len, labels))
    text = [f"{label:>{margin}} " + "".join(map(chr, codes_of_row)) for label, codes_of_row in zip(labels, codes, strict=True)]
    ends = f"{x[0]:g}", f"{x[-1]:g}"
    return [*text, " " * (margin + 1) + ends[0] + ends[1].rjust(width - len(ends[0]))]


def save(path: Path, title: str, x: np.ndarray, y: np.ndarray, slope: np.ndarray) -> None:
    """Write both curves as a picture, by the suffix of ``path``: PNG, SVG, PDF, or HTML that can be zoomed into.

    Raises:
        UserError: another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a picture's name ends in {', '.join(SUFFIXES)}")
    if path.suffix == ".html":
        import plotly.graph_objects as go

        figure = go.Figure([go.Scatter(x=x, y=y, name="f(x)"), go.Scatter(x=x, y=slope, name="f'(x)", line={"dash": "dash"})])
        figure.update_layout(title=title, xaxis_title="x", template="plotly_white")
        with atomic(path) as temporary:
            figure.write_html(temporary, include_plotlyjs=True)
        return
    # The object-oriented interface: pyplot would look for a display and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    axes.axhline(0, color="0.8", linewidth=0.8)
    axes.axvline(0, color="0.8", linewidth=0.8)
    axes.plot(x, y, label="f(x)")
    axes.plot(x, slope, "--", label="f'(x)")
    axes.set(title=title, xlabel="x", xlim=(float(x[0]), float(x[-1])))
    axes.legend(frameon=False)
    with atomic(path) as temporary:
        picture.savefig(temporary, format=path.suffix[1:])
