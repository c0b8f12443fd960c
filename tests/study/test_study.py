"""Studies: spec, grid, engine, table, answer, report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from toolkit import Manifest, UserError, results_table
from toolkit.cli import run
from toolkit.study.answer import sentence
from toolkit.study.compare import compare, effects, holm, over_seeds, paired_p
from toolkit.study.engine import claim
from toolkit.study.report import page_data
from toolkit.study.spec import Study, StudySpec

ROOT = Path(__file__).resolve().parents[2]


def spec_for(real: Path, **changes: object) -> dict[str, object]:
    return {
        "name": "small",
        "question": "Does <it> & work?",
        "data": str(real),
        "image_size": 32,
        "seeds": [0, 1],
        "generators": {"relu": {"*": "relu", "output": "tanh"}, "tanh": {"*": "tanh"}},
        "gan": {
            "max_steps": 8,
            "batch_size": 16,
            "validations": 2,
            "model": {"generator_width": 4, "discriminator_width": 4, "latent": 16},
        },
        "detector": {"max_steps": 6, "batch_size": 16, "validations": 2, "model": {"backbone": "test_resnet", "front_end": "residual"}},
        "clips": {"count": 10, "frames": 4, "keyframes": 2, "images": 24},
        **changes,
    }


def write(path: Path, value: object) -> Path:
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.fixture(scope="module")
def finished(puppets: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished study: its spec and its folder."""
    root = tmp_path_factory.mktemp("study")
    spec = write(root / "small.yaml", spec_for(puppets.root))
    assert run(["study", "run", str(spec), "--out", str(root / "out"), "--workers", "2"]) == 0
    return spec, root / "out"


def test_every_cell_has_its_folder_and_files(finished: tuple[Path, Path], puppets: Manifest) -> None:
    spec, folder = finished
    study = Study(StudySpec.load(spec), folder)
    of_seed = 3 * ["detector"] + 2 * ["robustness"]
    assert [c.kind for c in study.cells()] == ["features", "real"] + 4 * ["gan"] + 4 * ["quality"] + 2 * of_seed + ["audit"]
    for cell in study.cells():
        path = study.path(cell)
        result = json.loads((path / "result.json").read_text())
        assert result["status"] == "done", result
        assert json.loads((path / "cell.json").read_text())["key"] == cell.key == path.name
        if cell.kind == "gan":
            assert {"walk.webm", "grid.png", "clips.npy", "images.npy", "images-best.npy", "checkpoints"} <= {
                p.name for p in path.iterdir()
            }
            assert {c[1] for c in result["curves"]} >= {"val/frechet", "loss/generator"}
            assert result["sites"]["generator"]["up1.act"].startswith("toolkit_builtin/")


def test_results_table_is_tidy(finished: tuple[Path, Path]) -> None:
    table = pd.read_parquet(finished[1] / "results.parquet")
    expected = [
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
    ]
    assert list(table.columns)[:12] == expected
    assert set(table["generator"]) == {"real", "real, other people", "relu", "tanh", ""}
    pairs = table[(table["metric"] == "frame auc") & (table["trained_on"] != "control") & (table["perturbation"] == "")]
    assert len(pairs) == 2 * 2 * 2  # seeds x trained on x tested on
    assert ((pairs["value"] >= 0) & (pairs["value"] <= 1)).all()
    assert (pairs["n"] == 6).all()  # 4 real test clips and 2 walks: videos, not frames
    floor = table[table["generator"] == "real"]
    made = table[(table["generator"] == "relu") & (table["checkpoint"] == "final")]
    assert set(floor["metric"]) == set(made["metric"])
    value = dict(zip(floor["metric"], floor["value"], strict=True))
    for row in made.itertuples():
        assert row.floor == value[row.metric] or (np.isnan(row.floor) and np.isnan(value[row.metric]))
        assert row.n > 0
        assert (row.space != "") == ("[" in row.metric)
    assert set(made["space"].str.split().str[0].dropna()) == {"random", "trained"}
    assert set(table[(table["generator"] == "relu") & (table["checkpoint"] == "best")]["metric"]) < set(made["metric"])
    spoiled = table[table["perturbation"] != ""]
    assert spoiled.groupby("perturbation")["level"].nunique().to_dict() == {"blur": 4, "h264": 4, "jpeg": 8, "noise": 4, "resize": 4}
    control = table[(table["trained_on"] == "control") & (table["metric"] == "video brier")].set_index("seed")["value"]
    own = table[(table["trained_on"] == "relu") & (table["metric"] == "video brier")]
    assert (own["floor"] == own["seed"].map(control)).all()
    pd.testing.assert_frame_equal(results_table(finished[1]), table)


def test_training_people_are_disjoint(finished: tuple[Path, Path]) -> None:
    study = Study(StudySpec.load(finished[0]), finished[1])
    gan, detector = study.identities()
    real = study.manifest.table
    held = set(real.loc[real["split"] != "train", "identity"])
    assert gan
    assert detector
    assert not set(gan) & set(detector)
    assert not (set(gan) | set(detector)) & held


def test_running_again_changes_nothing(finished: tuple[Path, Path]) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished[1].rglob("result.json")}
    run(["study", "run", str(finished[0]), "--out", str(finished[1])])
    assert {p: p.stat().st_mtime_ns for p in finished[1].rglob("result.json")} == before


def test_report_is_one_self_contained_page(finished: tuple[Path, Path]) -> None:
    page = (finished[1] / "report.html").read_text()
    assert "Does &lt;it&gt; &amp; work?" in page
    assert page.index('class="question"') < page.index('class="answer"') < page.index("Quality against detectability")
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]+\"", markup)  # nothing is loaded from anywhere
    assert page.count("data:video/webm;base64,") == 3  # real, relu, tanh
    plots = page_data(page)
    assert set(plots) == {"scatter", "matrix", "measures", "curves", "health", "robustness"}
    table = pd.read_parquet(finished[1] / "results.parquet")
    frame_auc = table[(table["metric"] == "frame auc") & (table["perturbation"] == "")]
    mean = frame_auc[(frame_auc["trained_on"] == "relu") & (frame_auc["tested_on"] == "tanh")]["value"].mean()
    matrix = plots["matrix"]["data"][0]
    assert matrix["z"][matrix["y"].index("relu")][matrix["x"].index("tanh")] == pytest.approx(mean)
    transfer = (table["trained_on"] != table["tested_on"]) & (table["metric"] != "frame auc") & (table["trained_on"] != "control")
    assert page.count('<tr class="figure">') == int(((table["perturbation"] == "") & ~transfer).sum())
    grid = table[(table["perturbation"] == "") & (table["activation"] != "")].dropna(subset="value")
    levels = grid.groupby("metric")["activation"].nunique()  # a measure that could judge one generator only compares nothing
    # One more: the mean over spoiled frames.
    assert page.count('<tr class="effect">') == int((levels > 1).sum()) + 1 > 20
    assert "A classifier that sees metadata only reaches an AUC of" in page
    assert markup.count('alt="Grad-CAM, ') == 2
    written = pd.read_csv(finished[1] / "differences.csv")
    assert page.count('<tr class="difference">') == len(written)


def test_status_and_partial_report(puppets: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path / "s.yaml", spec_for(puppets.root))
    assert run(["study", "status", str(spec), "--out", str(tmp_path / "none")]) == 0
    assert "0 of 21 cells done" in capsys.readouterr().out
    with pytest.raises(UserError, match="no finished cell"):
        run(["study", "report", str(spec), "--out", str(tmp_path / "none")])


def test_a_failing_cell_spares_the_rest_and_is_tried_again(puppets: Manifest, tmp_path: Path) -> None:
    plan = spec_for(puppets.root, seeds=[0], control=False, features=["random"], robustness=False, audit=False)
    plan["detector"] = {**plan["detector"], "augmentations": {"flip": 0.5, "nonsense": 1.0}}
    spec = write(tmp_path / "s.yaml", plan)
    with pytest.raises(UserError, match=r"2 of 7 cells failed; detector relu, seed 0: TypeError.*nonsense"):
        run(["study", "run", str(spec), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert (tmp_path / "out" / "report.html").is_file()
    study = Study(StudySpec.load(spec), tmp_path / "out")
    assert sum(study.is_done(c) for c in study.cells()) == 5
    assert (tmp_path / "out" / "results.parquet").is_file()


def test_a_cell_is_claimed_once_and_the_claim_goes_with_its_holder(tmp_path: Path) -> None:
    with claim(tmp_path / "c") as first, claim(tmp_path / "c") as second:
        assert first
        assert not second
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, time; f = open({str(tmp_path / 'c' / 'lock')!r}, 'w'); "
            "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with claim(tmp_path / "c") as mine:
        assert not mine
    holder.kill()
    holder.wait()
    with claim(tmp_path / "c") as mine:
        assert mine


def test_key_follows_everything_that_determines_a_cell(puppets: Manifest, tmp_path: Path) -> None:
    def keys(**changes: object) -> list[str]:
        return [c.key for c in Study(StudySpec.load(write(tmp_path / "s.yaml", spec_for(puppets.root, **changes))), tmp_path).cells()]

    base = keys()
    assert keys() == base
    assert keys(question="another", name="other") == base
    assert len(set(keys(gan_share=0.5)) & set(base)) == 0
    more = keys(generators={"relu": {"*": "relu", "output": "tanh"}, "tanh": {"*": "tanh"}, "elu": {"*": "elu"}})
    assert set(base[:10]) <= set(more)  # what is trained already stays trained
    alias = keys(generators={"relu": {"*": "toolkit_builtin/relu", "output": "tanh"}, "tanh": {"*": {"name": "tanh"}}})
    assert alias == base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [0]}, "unknown key 'sedes'.*Did you mean 'seeds'"),
        ({"seeds": "x"}, "seeds is a list"),
        ({"seeds": [0, 0]}, "twice"),
        ({"image_size": "32"}, "must be of type int"),
        ({"gan": {"max_step": 3}}, "gan: unknown key 'max_step'"),
        ({"generators": {"a": {"*": "rulu"}}}, "unknown activation 'rulu'"),
        ({"generators": {"a": {"*": "swish(bta=1)"}}}, "no parameter 'bta'"),
        ({"generators": {}}, "generators is empty"),
        ({"upsampling": ["cubic"]}, "upsampling 'cubic'"),
        ({"name": "../x"}, "names a folder"),
        ({"clips": {"count": 3}}, "count of at least 10"),
        ({"data": "/nowhere"}, "is not there"),
    ],
)
def test_mistakes_are_one_line(puppets: Manifest, tmp_path: Path, change: dict[str, object], message: str) -> None:
    spec = write(tmp_path / "s.yaml", spec_for(puppets.root, **change))
    with pytest.raises(UserError, match=message) as caught:
        run(["study", "run", str(spec), "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_shipped_studies_load() -> None:
    for path in (ROOT / "configs" / "studies").glob("*.yaml"):
        assert len(StudySpec.load(path).networks()) >= 2
    assert len(StudySpec.load(ROOT / "toolkit" / "study" / "demo.yaml").networks()) >= 3


def test_holm_by_hand_and_with_undefined_tests() -> None:
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]).tolist() == pytest.approx([1.0, 1.0])
    assert np.isnan(holm([np.nan, 0.02])[0])
    assert holm([np.nan, 0.02])[1] == pytest.approx(0.02)


def table_of(values: dict[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame([{"generator": g, "seed": s, "value": v, "metric": "m"} for g, row in values.items() for s, v in enumerate(row)])


def test_comparison_finds_a_real_difference_and_admits_none() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 1, 5)  # seeds differ more than generators do: only pairing shows the difference
    values = {"a": list(seeds), "b": list(seeds + 0.5 + rng.normal(0, 0.02, 5)), "c": list(seeds + 0.5 + rng.normal(0, 0.02, 5))}
    clear = compare(table_of(values), "m")
    assert clear is not None
    assert {(row.a, row.b) for row in clear.shown.itertuples()} == {("a", "b"), ("a", "c")}
    assert "A difference is shown for 2 of 3 pairs: a from" in sentence(clear, "best", "worst")
    noise = compare(table_of({g: list(rng.normal(0, 1, 3)) for g in "abcd"}), "m")
    assert noise is not None
    assert "No difference is shown" in sentence(noise, "best", "worst")
    single = compare(table_of({"a": [1.0], "b": [2.0]}), "m")
    assert single is not None
    assert "With one seed nothing can be said" in sentence(single, "best", "worst")
    assert compare(table_of({"a": [1.0, 2.0]}), "m") is None
    limit = compare(table_of({"a": [1.0, 1.0], "b": [1.0, 1.0]}), "m")
    assert limit is not None
    assert sentence(limit, "best", "worst") == "all are alike: m 1 (means of 2 trainings)."


def test_pairs_equal_scipy_and_holm_is_over_all_of_them() -> None:
    rng = np.random.default_rng(1)
    values = {g: list(rng.normal(i, 1, 6)) for i, g in enumerate("abc")}
    found = compare(table_of(values), "m")
    assert found is not None
    for row in found.pairs.itertuples():
        theirs = stats.ttest_rel(values[row.a], values[row.b])
        assert row.p == pytest.approx(theirs.pvalue, rel=1e-9)
        low, high = theirs.confidence_interval()
        assert (row.low, row.high) == pytest.approx((low, high), rel=1e-9)
    assert found.pairs["p_holm"].tolist() == pytest.approx(holm(found.pairs["p"].tolist()).tolist())
    assert np.isnan(paired_p(np.array([0.3, 0.3, 0.3])))  # a measure at its limit proves nothing


def crossed(effect_a: float, effect_b: float, noise: float, seeds: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {"activation": f"a{a}", "upsampling": f"b{b}", "seed": s, "value": effect_a * a + effect_b * b + 3 * s + rng.normal(0, noise)}
            for a in range(3)
            for b in range(2)
            for s in range(seeds)
        ]
    )


def test_effects_by_hand() -> None:
    # One factor, two levels, two blocks: 1, 3 / 2, 6. Grand mean 3: SS factor 9, block 4, rest 1, total 14.
    rows = pd.DataFrame({"activation": ["a", "b", "a", "b"], "upsampling": "u", "seed": [0, 0, 1, 1], "value": [1.0, 3.0, 2.0, 6.0]})
    found = effects(rows)
    assert found is not None
    by = found.set_index("source")
    assert by.loc["activation", ["share", "df", "F", "range"]].tolist() == pytest.approx([9 / 14, 1, 9.0, 3.0])
    assert by.loc["seed", "share"] == pytest.approx(4 / 14)
    assert by.loc["rest", "share"] == pytest.approx(1 / 14)
    assert by.loc["activation", "p"] == pytest.approx(stats.ttest_rel([1, 2], [3, 6]).pvalue)  # F = t^2 with two levels


def test_effects_equal_the_extra_sum_of_squares_of_regressions() -> None:
    rows = crossed(1.0, 0.3, 0.5)
    found = effects(rows)
    assert found is not None
    by = found.set_index("source")

    def residual(*columns: str) -> float:
        parts = [np.ones((len(rows), 1))]
        for column in columns:
            values = rows["activation"] + rows["upsampling"] if column == "joint" else rows[column]
            parts.append(pd.get_dummies(values).to_numpy(float))
        design = np.concatenate(parts, axis=1)
        fit = design @ np.linalg.lstsq(design, rows["value"].to_numpy(), rcond=None)[0]
        return float(((rows["value"] - fit) ** 2).sum())

    total = float(((rows["value"] - rows["value"].mean()) ** 2).sum())
    additive = residual("activation", "upsampling", "seed")
    assert by.loc["activation", "share"] == pytest.approx((residual("upsampling", "seed") - additive) / total)
    assert by.loc["upsampling", "share"] == pytest.approx((residual("activation", "seed") - additive) / total)
    assert by.loc["activation x upsampling", "share"] == pytest.approx((additive - residual("joint", "seed")) / total)
    assert by["share"].sum() == pytest.approx(1)
    assert by.loc["activation", "p"] < 0.001


def test_effects_are_refused_where_the_design_has_holes() -> None:
    rows = crossed(1.0, 0.3, 0.5)
    missing = rows[~((rows["activation"] == "a0") & (rows["upsampling"] == "b0"))]
    assert effects(missing) is None
    one_block_less = effects(rows.drop(index=0))
    assert one_block_less is not None
    assert one_block_less.set_index("source").loc["seed", "df"] == 1
    assert effects(rows[rows["seed"] == 0]) is None


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Five equal generators, three seeds: Holm keeps the chance of any false claim in a measure near 5 %."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        found = compare(table_of({g: list(rng.normal(0, 1, 3)) for g in "abcde"}), "m")
        assert found is not None
        alarms += bool(len(found.shown))
    assert alarms / 200 < 0.09


def test_intervals_over_seeds_equal_scipy() -> None:
    x = np.array([1.0, 2.5, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 3, loc=x.mean(), scale=stats.sem(x))
    assert over_seeds(x) == pytest.approx((x.mean(), low, high, 4))
    assert np.isnan(over_seeds(np.array([1.0]))[1])


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_report_in_a_browser(finished: tuple[Path, Path], chromium: str, tmp_path: Path, width: int, dark: bool) -> None:
    """Every plot is drawn, videos can be decoded, and nothing is wider than the screen."""
    probe = """<script>addEventListener("load", () => setTimeout(async () => {
      const videos = [...document.querySelectorAll("video")];
      await Promise.all(videos.map(v => v.readyState >= 2 ? 0 : new Promise(r => {
        v.onloadeddata = r; v.onerror = r; setTimeout(r, 4000); })));
      const p = document.createElement("p"); p.id = "probe";
      p.textContent = JSON.stringify({
        places: document.querySelectorAll(".plot").length,
        drawn: [...document.querySelectorAll(".plot")].filter(e => e.querySelector(".main-svg")).length,
        videos: videos.map(v => v.videoWidth), wide: document.documentElement.scrollWidth, inner: innerWidth,
        ink: getComputedStyle(document.body).color, text: getComputedStyle(document.querySelector(".plot text")).fill});
      document.body.append(p); }, 1500));</script></body>"""
    page = tmp_path / "page.html"
    page.write_text((finished[1] / "report.html").read_text().replace("</body>", probe))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={max(width, 500)},2000",
        "--virtual-time-budget=20000",
    ]
    if dark:
        flags.append("--blink-settings=preferredColorScheme=0")
    dumped = subprocess.run(
        [chromium, *flags, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    match = re.search(r'<p id="probe">(.*?)</p>', dumped)
    assert match, dumped[-500:]
    found = json.loads(match[1])
    assert found["drawn"] == found["places"] == 6
    assert found["videos"]
    assert all(w > 0 for w in found["videos"])
    assert found["wide"] <= found["inner"] + 1
