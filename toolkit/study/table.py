"""The results table of a study: one row per figure, made from the cells at any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from toolkit.errors import UserError
from toolkit.files import atomic, read_json
from toolkit.study.spec import CONTROL, STRANGERS, Study

COLUMNS = (
    "cell",
    "seed",
    "generator",
    "discriminator",
    "detector",
    "trained_on",
    "tested_on",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n",
)


def cell_results(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """``(cell.json, result.json)`` of every finished cell below a study's folder."""
    paths = sorted(Path(folder).glob("cells/*/result.json"))
    return [(read_json(path.parent / "cell.json"), read_json(path)) for path in paths]


def _rules(rules: dict[str, str]) -> str:
    return ", ".join(f"{pattern}: {value}" for pattern, value in rules.items())


def results_table(folder: Path | str, keys: set[str] | None = None) -> pd.DataFrame:
    """The tidy table of a study's folder.

    Args:
        folder: of the study.
        keys: take only these cells; all finished ones by default.

    Returns:
        One row per figure with the columns of :data:`COLUMNS` and ``unit``, ``better``. ``generator`` is the label of
        the grid; ``real`` is the floor (real against real of the same people), ``real, other people`` how far other people
        are from them. ``trained_on`` and ``tested_on`` are labels too.
    """
    rows: list[dict[str, Any]] = []
    for cell, result in cell_results(Path(folder)):
        if keys is not None and cell["key"] not in keys:
            continue
        base = {
            "cell": cell["key"],
            "seed": cell["seed"],
            "generator": "",
            "discriminator": "",
            "detector": "",
            "trained_on": "",
            "tested_on": "",
        }
        if cell["kind"] == "detector":
            model = cell["options"]["training"]["model"]
            base |= {
                "detector": f"{model.get('backbone', 'resnet18')}, {model.get('front_end', 'rgb')}",
                "trained_on": cell["label"],
            }
            for test in result["tests"]:
                rows += [_row(base | {"tested_on": test["tested_on"]}, m) for m in test["measures"]]
            continue
        base["generator"] = cell["label"]
        if cell["kind"] == "gan":
            base["discriminator"] = _rules(cell["options"]["model"]["activations"]["discriminator"])
        rows += [_row(base, m) for m in result["measures"]]
        rows += [_row(base | {"generator": STRANGERS}, m) for m in result.get("others", [])]
    return pd.DataFrame(rows, columns=[*COLUMNS, "unit", "better"])


def _row(base: dict[str, Any], measure: dict[str, Any]) -> dict[str, Any]:
    return {
        **base,
        "metric": measure["metric"],
        "value": _number(measure["value"]),
        "ci_low": _number(measure["low"]),
        "ci_high": _number(measure["high"]),
        "n": measure["n"],
        "unit": measure.get("unit", ""),
        "better": measure.get("better", "higher"),
    }


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def write_table(study: Study) -> pd.DataFrame:
    """Write ``results.parquet`` of the study's own cells; returns the table.

    Raises:
        UserError: no cell is finished.
    """
    table = results_table(study.folder, {cell.key for cell in study.cells()})
    if table.empty:
        raise UserError(f"{study.folder} has no finished cell yet; run the study first")
    with atomic(study.folder / "results.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    return table


def over_seeds(values: pd.Series | np.ndarray) -> tuple[float, float, float, int]:
    """Mean and 95% t-interval of one figure over seeds: ``(mean, low, high, n)``; no interval for fewer than two."""
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    if len(x) == 0:
        return (float("nan"),) * 3 + (0,)
    mean = float(x.mean())
    if len(x) < 2:
        return mean, float("nan"), float("nan"), 1
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return mean, mean - half, mean + half, len(x)


def paired_difference(table: pd.DataFrame, metric: str, a: str, b: str, column: str = "generator") -> tuple[float, float, float, int]:
    """``a`` minus ``b`` in ``metric``, seed by seed: mean and 95% t-interval of the differences."""
    rows = table[table["metric"] == metric].groupby([column, "seed"])["value"].mean().unstack("seed")
    if a not in rows.index or b not in rows.index:
        return (float("nan"),) * 3 + (0,)
    return over_seeds((rows.loc[a] - rows.loc[b]).to_numpy())


def detection_matrix(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """``metric`` of detectors trained on the row's fakes and tested on the column's, mean over seeds."""
    rows = table[(table["metric"] == metric) & ~table["trained_on"].isin(["", CONTROL])]
    return rows.pivot_table(index="trained_on", columns="tested_on", values="value", aggfunc="mean", sort=False)
