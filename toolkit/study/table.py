"""The results table of a study: one row per figure, made from the cells at any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from toolkit.errors import UserError
from toolkit.files import atomic, read_json
from toolkit.study.spec import CONTROL, REAL, STRANGERS, Study

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
    "unit",
    "better",
    "space",
    "checkpoint",
    "perturbation",
    "level",
    "activation",
    "upsampling",
    "floor",
)
LOWER = ("eer", "log loss", "brier", "calibration error")


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
        One row per figure with the columns of :data:`COLUMNS`:

        - ``generator``: label of the grid; ``real`` is the floor (real against real of the same people), ``real, other
          people`` how far other people are from them. Empty for detection, where ``trained_on`` and ``tested_on`` are labels.
        - ``activation`` and ``upsampling``: the two parts of the label (of ``trained_on`` for detection).
        - ``value, ci_low, ci_high, n``: the figure, its 95% interval, and the number of images, clips or videos.
        - ``space``: feature space with the hash of its network. ``checkpoint``: ``final``, or ``best`` on validation people.
        - ``perturbation, level``: how test frames were spoiled; empty where they were not.
        - ``floor``: the same figure for real against real; for detection that of the control of the same seed.
    """
    found = [(cell, result) for cell, result in cell_results(Path(folder)) if keys is None or cell["key"] in keys]
    grid = {(c["label"], c["seed"]): c["options"]["model"] for c, _ in found if c["kind"] == "gan"}
    rows: list[dict[str, Any]] = []
    for cell, result in found:
        base: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        base |= {"cell": cell["key"], "seed": cell["seed"], "level": float("nan")}
        model = grid.get((cell["label"], cell["seed"]))
        if model is not None:
            base["upsampling"] = model["upsampling"]
            base["activation"] = cell["label"].removesuffix(f", {model['upsampling']}")
        if cell["kind"] in ("detector", "robustness"):
            network = cell["options"]["training"]["model"]
            base["detector"] = f"{network.get('backbone', 'resnet18')}, {network.get('front_end', 'rgb')}"
            base["trained_on"] = cell["label"]
        if cell["kind"] == "detector":
            for test in result["tests"]:
                rows += [_row(base | {"tested_on": test["tested_on"]}, m) for m in test["measures"]]
        elif cell["kind"] == "robustness":
            base["tested_on"] = cell["label"]
            spoiled = [m for m in result["curves"] if m["perturbation"] != "none"]  # the untouched ones are the detector's own
            rows += [_row(base | {"perturbation": m["perturbation"], "level": float(m["level"])}, m) for m in spoiled]
        elif cell["kind"] == "real":
            rows += [_row(base | {"generator": REAL}, m) for m in result["measures"]]
            rows += [_row(base | {"generator": STRANGERS}, m) for m in result["others"]]
        elif cell["kind"] == "quality":
            if model is not None:
                base["discriminator"] = _rules(model["activations"]["discriminator"])
            base["generator"] = cell["label"]
            rows += [_row(base | {"checkpoint": "final"}, m) for m in result["measures"]]
            rows += [_row(base | {"checkpoint": "best"}, m) for m in result["best"]]
    return _with_floor(pd.DataFrame(rows, columns=list(COLUMNS)))


def _row(base: dict[str, Any], measure: dict[str, Any]) -> dict[str, Any]:
    name = measure["metric"]
    return {
        **base,
        "metric": name,
        "value": _number(measure["value"]),
        "ci_low": _number(measure["low"]),
        "ci_high": _number(measure["high"]),
        "n": measure["n"],
        "unit": measure.get("unit", ""),
        "better": measure.get("better", "lower" if name.endswith(LOWER) else "higher"),
        "space": measure.get("space", ""),
    }


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _with_floor(table: pd.DataFrame) -> pd.DataFrame:
    real = table[table["generator"] == REAL].set_index("metric")["value"]
    control = table[table["trained_on"] == CONTROL].set_index(["seed", "metric"])["value"]
    floor = table["metric"].map(real[~real.index.duplicated()]).where(table["generator"] != "")
    of_seed = pd.Series(control[~control.index.duplicated()].reindex(pd.MultiIndex.from_frame(table[["seed", "metric"]])).to_numpy())
    return table.assign(floor=floor.fillna(of_seed.where(table["trained_on"] != "")).astype(float))


def write_table(study: Study) -> pd.DataFrame:
    """Write ``results.parquet`` of the study's own cells; returns the table.

    Raises:
        UserError: no cell is finished.
    """
    table = results_table(study.folder, {cell.key for cell in study.cells()})
    if table.empty:
        raise UserError(f"{study.folder} has no finished cell with a figure yet; run the study first")
    with atomic(study.folder / "results.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    return table


def detection_matrix(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """``metric`` of detectors trained on the row's fakes and tested on the column's, mean over seeds."""
    rows = table[(table["metric"] == metric) & ~table["trained_on"].isin(["", CONTROL]) & (table["perturbation"] == "")]
    return rows.pivot_table(index="trained_on", columns="tested_on", values="value", aggfunc="mean", sort=False)
