"""Studies: spec, grid, engine, table, answer, report."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from toolkit import Manifest, UserError, results_table
from toolkit.cli import run
from toolkit.study.answer import compare, holm, sentence
from toolkit.study.engine import claim
from toolkit.study.report import page_data
from toolkit.study.spec import Study, StudySpec
from toolkit.study.table import over_seeds, paired_difference

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
    assert [c.kind for c in study.cells()] == ["real"] + 4 * ["gan"] + ["detector", "detector", "detector"] * 2
    for cell in study.cells():
        path = study.path(cell)
        result = json.loads((path / "result.json").read_text())
        assert result["status"] == "done", result
        assert json.loads((path / "cell.json").read_text())["key"] == cell.key == path.name
        if cell.kind == "gan":
            assert {"walk.webm", "grid.png", "clips.npy", "checkpoints"} <= {p.name for p in path.iterdir()}
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
    pairs = table[(table["metric"] == "frame auc") & (table["trained_on"] != "control")]
    assert len(pairs) == 2 * 2 * 2  # seeds x trained on x tested on
    assert ((pairs["value"] >= 0) & (pairs["value"] <= 1)).all()
    assert (pairs["n"] == 6).all()  # 4 real test clips and 2 walks: videos, not frames
    floor = table[table["generator"] == "real"]
    assert set(floor["metric"]) == set(table[table["generator"] == "relu"]["metric"])
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
    assert set(plots) == {"scatter", "matrix", "measures", "curves", "health"}
    table = pd.read_parquet(finished[1] / "results.parquet")
    mean = table[(table["metric"] == "frame auc") & (table["trained_on"] == "relu") & (table["tested_on"] == "tanh")]["value"].mean()
    matrix = plots["matrix"]["data"][0]
    assert matrix["z"][matrix["y"].index("relu")][matrix["x"].index("tanh")] == pytest.approx(mean)
    assert page.count("<tr><td>") == len(table)


def test_status_and_partial_report(puppets: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path / "s.yaml", spec_for(puppets.root))
    assert run(["study", "status", str(spec), "--out", str(tmp_path / "none")]) == 0
    assert "0 of 11 cells done" in capsys.readouterr().out
    with pytest.raises(UserError, match="no finished cell"):
        run(["study", "report", str(spec), "--out", str(tmp_path / "none")])


def test_a_failing_cell_spares_the_rest_and_is_tried_again(puppets: Manifest, tmp_path: Path) -> None:
    plan = spec_for(puppets.root, seeds=[0], control=False)
    plan["detector"] = {**plan["detector"], "augmentations": {"flip": 0.5, "nonsense": 1.0}}  # type: ignore[dict-item]
    spec = write(tmp_path / "s.yaml", plan)
    with pytest.raises(UserError, match=r"2 of 5 cells failed; detector relu, seed 0: TypeError.*nonsense"):
        run(["study", "run", str(spec), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert (tmp_path / "out" / "report.html").is_file()
    study = Study(StudySpec.load(spec), tmp_path / "out")
    assert sum(study.is_done(c) for c in study.cells()) == 3


@pytest.mark.slow
def test_killed_at_any_moment_it_continues_to_the_same_result(puppets: Manifest, tmp_path: Path, finished: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "toolkit", "study", "run", str(finished[0]), "--out", str(out), "--workers", "2"]
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(float(rng.uniform(9, 18)))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
    ours, theirs = (results_table(p).sort_values(["cell", "tested_on", "metric"], ignore_index=True) for p in (out, finished[1]))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-4, atol=1e-5)


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
    assert set(base[:5]) <= set(more)  # what is trained already stays trained
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
    clear = compare(table_of({"a": list(seeds), "b": list(seeds + 0.5 + rng.normal(0, 0.02, 5)), "real": [9.0] * 5}), "m")
    assert clear is not None
    assert clear.shown == ["b"]
    assert "is shown for b" in sentence(clear, "best", "worst")
    assert "real" not in clear.means
    noise = compare(table_of({g: list(rng.normal(0, 1, 3)) for g in "abcd"}), "m")
    assert noise is not None
    assert "No difference between activations is shown" in sentence(noise, "best", "worst")
    single = compare(table_of({"a": [1.0], "b": [2.0]}), "m")
    assert single is not None
    assert "With one seed nothing can be said" in sentence(single, "best", "worst")


def test_intervals_over_seeds_equal_scipy() -> None:
    x = np.array([1.0, 2.5, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 3, loc=x.mean(), scale=stats.sem(x))
    assert over_seeds(x) == pytest.approx((x.mean(), low, high, 4))
    assert np.isnan(over_seeds(np.array([1.0]))[1])
    table = table_of({"a": [1.0, 2.0, 3.0], "b": [0.5, 1.0, 2.5]})
    assert paired_difference(table, "m", "a", "b")[0] == pytest.approx(np.mean([0.5, 1.0, 0.5]))


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
    assert found["drawn"] == found["places"] == 5
    assert found["videos"]
    assert all(w > 0 for w in found["videos"])
    assert found["wide"] <= found["inner"] + 1
