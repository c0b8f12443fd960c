"""``report.html``: one self-contained page that opens with the question and the answer."""

from __future__ import annotations

import base64
import datetime
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml

import toolkit
from toolkit.detector.explain import in_colour
from toolkit.files import atomic, write_text
from toolkit.pictures import enlarge, png
from toolkit.study import figures
from toolkit.study.answer import DETECTABILITY, FACTORS, answer, comparisons, differences, distance_to_ideal, of_generators
from toolkit.study.compare import Comparison, effects
from toolkit.study.spec import CONTROL, REAL, Study
from toolkit.study.table import cell_results, detection_matrix, write_table

Cells = list[tuple[dict[str, Any], dict[str, Any]]]


def write_report(study: Study) -> Path:
    """Write ``results.parquet``, ``differences.csv`` and ``report.html`` from the finished cells.

    Returns:
        The page's path.

    Raises:
        UserError: no cell is finished.
    """
    table = write_table(study)
    keys = {cell.key for cell in study.cells()}
    cells = [(cell, result) for cell, result in cell_results(study.folder) if cell["key"] in keys]
    found = comparisons(table)
    with atomic(study.folder / "differences.csv") as temporary:
        differences(found).to_csv(temporary, index=False)
    page = _environment().get_template("report.html.j2").render(**_content(study, table, cells, found))
    path = study.folder / "report.html"
    write_text(path, page)
    return path


def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(lambda name: resources.files("toolkit.study").joinpath(name).read_text(encoding="utf-8"))
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _content(study: Study, table: pd.DataFrame, cells: Cells, found: dict[tuple[str, str], Comparison]) -> dict[str, Any]:
    from plotly.offline import get_plotlyjs

    spec = study.spec
    labels = figures.robust_labels(table, list(spec.networks()))
    plots: dict[str, Any] = {}
    if not figures.own_detection(table).empty:
        plots["scatter"] = figures.quality_against_detectability(table, labels)
    matrix = detection_matrix(table, DETECTABILITY)
    if not matrix.empty:
        plots["matrix"] = figures.transfer_matrix(matrix, labels)
    if (table["generator"].isin(labels)).any():
        plots["measures"] = figures.measures(table, labels)
    plots["curves"] = figures.learning_curves(cells, labels)
    if (health := figures.health(cells, labels)) is not None:
        plots["health"] = health
    spoiled = [{"label": c["label"], "seed": c["seed"], **row} for c, r in cells if c["kind"] == "robustness" for row in r["curves"]]
    if spoiled:
        plots["robustness"] = figures.robustness(pd.DataFrame(spoiled), labels)
    audits = [r for c, r in cells if c["kind"] == "audit" and r["status"] == "done"]
    lines = answer(table, found) + [f"Shortcuts. {r['verdict']}" for r in audits]
    done, total = sum(study.is_done(c) for c in study.cells()), len(study.cells())
    return {
        "spec": spec,
        "title": spec.name.replace("_", " "),
        "answer": [part.split(". ", 1) for part in lines],
        "plots": {name: _json(figure.to_json()) for name, figure in plots.items()},
        "plotlyjs": get_plotlyjs(),
        "clips": _clips(study, cells, labels),
        "colours": figures.colours(labels),
        "effects": _effects(table, found),
        "differences": _differences(found),
        "factors": [f for f in FACTORS if any(factor == f for _, factor in found)],
        "audit": audits[0] if audits else None,
        "seen": _seen(study, cells, labels),
        "rows": _table_rows(_shown_rows(table)),
        "all_rows": len(table),
        "problems": [
            (c["label"], c["seed"], c["kind"], r.get("message") or f"collapsed by step {r['collapsed_at']}")
            for c, r in cells
            if r["status"] != "done" or r.get("collapsed_at") is not None
        ],
        "done": done,
        "total": total,
        "facts": _facts(study, cells),
        "spec_yaml": _spec_yaml(study),
        "networks": [(label, _rules(options)) for label, options in spec.networks().items()],
        "command": f"toolkit study run {study.source or spec.name + '.yaml'} --data {spec.data}",
        "version": toolkit.__version__,
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _json(text: str) -> str:
    """JSON that can stand inside a script element whatever its strings hold."""
    return text.replace("</", "<\\/").replace("<!--", "<\\!--")


def _rules(options: dict[str, Any]) -> str:
    rules = options["activations"]["generator"]
    return "; ".join(f"{pattern}: {value}" for pattern, value in rules.items()) or "as built"


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _clips(study: Study, cells: Cells, labels: list[str]) -> list[dict[str, Any]]:
    """Real clips, then each generator's walk of the first seed, all along one latent path."""
    shown = []
    first = study.spec.seeds[0]
    wanted = [(REAL, 0), *((label, first) for label in labels)]
    by_place = {(c["label"], c["seed"]): c["key"] for c, r in cells if c["kind"] in ("real", "gan") and r["status"] == "done"}
    for place in wanted:
        key = by_place.get(place)
        if key and (study.path(key) / "walk.webm").is_file():
            folder = study.path(key)
            shown.append(
                {
                    "label": "real people no GAN has seen" if place[0] == REAL else place[0],
                    "video": _data_url((folder / "walk.webm").read_bytes(), "video/webm"),
                    "grid": _data_url((folder / "grid.png").read_bytes(), "image/png"),
                }
            )
    return shown


def _seen(study: Study, cells: Cells, labels: list[str]) -> list[dict[str, str]]:
    """Grad-CAM pictures and residual spectra of the first seed's detectors."""
    first = study.spec.seeds[0]
    tests = {c["label"]: (c, r) for c, r in cells if c["kind"] == "robustness" and c["seed"] == first and r["status"] == "done"}
    spectra = {label: np.array(tests[label][1]["spectra"]["fake"]) for label in labels if label in tests}
    if not spectra:
        return []
    real = np.array(next(iter(tests.values()))[1]["spectra"]["real"])
    pictures, _, _ = in_colour([real, *spectra.values()])
    shown = []
    for label, picture in zip(["real", *spectra], pictures, strict=True):
        path = study.path(tests[label][0]["key"]) / "gradcam.png" if label in tests else None
        spectrum = _data_url(png(enlarge(picture, max(1, 128 // len(picture)))), "image/png")
        cam = _data_url(path.read_bytes(), "image/png") if path is not None and path.is_file() else ""
        shown.append({"label": label, "spectrum": spectrum, "cam": cam})
    return shown


def _p(value: float) -> str:
    return "–" if not np.isfinite(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _effects(table: pd.DataFrame, found: dict[tuple[str, str], Comparison]) -> list[dict[str, Any]]:
    """One row per measure: what each factor explains, and how many pairs of its levels are told apart."""
    rows = []
    for metric in dict.fromkeys(metric for metric, _ in found):
        shares = effects(distance_to_ideal(of_generators(table, metric)), FACTORS)
        by_source = {} if shares is None else {row.source: row for row in shares.itertuples()}
        cells = []
        for factor in FACTORS:
            comparison = found.get((metric, factor))
            if comparison is None:
                continue
            effect = by_source.get(factor)
            share = f"{effect.share:.0%} (p {_p(effect.p)})" if effect is not None else "–"
            best = "all alike" if comparison.alike else next(iter(comparison.means))
            cells.append({"share": share, "best": best, "pairs": f"{len(comparison.shown)} of {len(comparison.pairs)}"})
        floor = table.loc[table["metric"] == metric, "floor"].mean()
        rows.append({"metric": metric, "cells": cells, "floor": _number(floor) if np.isfinite(floor) else "–"})
    return rows


def _differences(found: dict[tuple[str, str], Comparison]) -> list[dict[str, str]]:
    return [
        {
            "metric": row.metric,
            "pair": f"{row.a} – {row.b}",
            "difference": _number(row.difference),
            "interval": f"{_number(row.low)} to {_number(row.high)}" if np.isfinite(row.low) else "–",
            "n": str(row.n),
            "p": _p(row.p_holm),
            "shown": "yes" if row.p_holm < 0.05 else "",
        }
        for row in differences(found).itertuples()
    ]


def _shown_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that the page's table has room for: everything but spoiled frames and most of the transfer matrix."""
    other = (table["trained_on"] != table["tested_on"]) & (table["metric"] != DETECTABILITY) & (table["trained_on"] != CONTROL)
    return table[(table["perturbation"] == "") & ~other]


def _table_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for row in table.itertuples(index=False):
        what = row.generator or f"detector: {row.trained_on} on {row.tested_on}"
        if row.checkpoint == "best":
            what += " (best checkpoint)"
        rows.append(
            {
                "what": str(what) if what != REAL else "real (the floor)",
                "seed": str(row.seed),
                "metric": str(row.metric),
                "value": _number(row.value),
                "interval": f"{_number(row.ci_low)} to {_number(row.ci_high)}" if np.isfinite(row.ci_low) else "–",
                "n": str(row.n),
                "floor": _number(row.floor) if np.isfinite(row.floor) else "–",
                "unit": str(row.unit),
            }
        )
    return rows


def _number(value: Any) -> str:
    if not np.isfinite(value):
        return "cannot be judged"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


def _facts(study: Study, cells: Cells) -> list[tuple[str, str]]:
    real = study.manifest.table[study.manifest.table["label"] == "real"]
    gan, detector = study.identities()
    size = {s: int(real.loc[real["split"] == s, "identity"].nunique()) for s in ("val", "test")}
    versions = cells[0][1].get("versions", {})
    seconds = sum(r["seconds"] for _, r in cells)
    spaces = sorted({m["space"] for _, r in cells for m in r.get("measures", []) if m.get("space")})
    named = [part.get("plugins", {}) for c, _ in cells for part in (c["options"], c["options"].get("measures", {}))]
    foreign = {name: fingerprint for part in named for name, fingerprint in part.items()}
    return [
        (
            "real data",
            f"{real['frame'].count()} frames of {real['video'].nunique()} videos, {real['identity'].nunique()} identities; "
            f"fingerprint {study.manifest.fingerprint()}",
        ),
        (
            "identities",
            f"{len(gan)} train the GANs, {len(detector)} train the detectors, {size['val']} validate, {size['test']} test; no one twice",
        ),
        ("seeds", ", ".join(map(str, study.spec.seeds))),
        ("feature space", "; ".join(spaces) or "none"),
        ("computing time", f"{seconds / 60:.0f} minutes in {len(cells)} cells"),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        *([("plugins", ", ".join(f"{name} ({fingerprint})" for name, fingerprint in foreign.items()))] if foreign else []),
    ]


def _spec_yaml(study: Study) -> str:
    import dataclasses

    def plain(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return yaml.safe_dump(plain(dataclasses.asdict(study.spec)), sort_keys=False, allow_unicode=True, width=100)


def page_data(page: str) -> dict[str, Any]:
    """The figures of a written page, read back: name -> plotly figure as a dictionary."""
    found = re.findall(r'<script type="application/json" id="plot-(\w+)">(.*?)</script>', page, re.DOTALL)
    return {name: json.loads(text) for name, text in found}
