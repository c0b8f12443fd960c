"""Plugins as files: what is wrong with one is told and harms nobody else; configs and studies name them; the examples work."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from toolkit import Activation, Manifest, Measure, Registry
from toolkit.activations import plot
from toolkit.cli import run
from toolkit.data.frames import load_frames
from toolkit.data.video import write_video
from toolkit.errors import UserError
from toolkit.plugins import FILES_VARIABLE, Plugins, plugins, use_files
from toolkit.study.spec import Study, StudySpec

EXAMPLES = Path(__file__).resolve().parents[1] / "plugins" / "examples"
HEAD = "from toolkit import Activation, Measure, hookimpl\n"
BENT = """
    @hookimpl
    def toolkit_activations():
        return [Activation("bent", lambda x: x * x.sigmoid())]
"""


@pytest.fixture(autouse=True)
def _own_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test loads its own plugins, and leaves none behind."""
    monkeypatch.setenv(FILES_VARIABLE, "")
    plugins.cache_clear()
    yield
    plugins.cache_clear()


def write(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + textwrap.dedent(body))
    return path


BROKEN = {
    "syntax": ("def toolkit_activations(:", "SyntaxError"),
    "imports": ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    "leaves": ("raise SystemExit(3)", "SystemExit: 3"),
    "no_hook": ("x = 1", "it has no hook; the hooks are toolkit_activation_backends, toolkit_activations"),
    "unmarked": ("def toolkit_activations():\n    return []", r"toolkit_activations\(\) is not marked with @hookimpl"),
    "unknown": ("@hookimpl\ndef toolkit_activation():\n    return []", "unknown hook 'toolkit_activation'.*Did you mean"),
    "arguments": ("@hookimpl\ndef toolkit_activations(config):\n    return []", "called without arguments, and must not ask for config"),
    "number": ("@hookimpl\ndef toolkit_activations():\n    return 3", "must return a list of Activation, not int 3"),
    "words": ("@hookimpl\ndef toolkit_activations():\n    return ['swish']", "list of Activation, which str 'swish' is not"),
    "raises": ("@hookimpl\ndef toolkit_activations():\n    return [1 / 0]", r"toolkit_activations\(\) failed: ZeroDivisionError"),
    "declares": (
        "@hookimpl\ndef toolkit_activations():\n    return [Activation('my act', lambda x: x)]",
        "activation name 'my act' is not an identifier",
    ),
    "twice": (
        "@hookimpl\ndef toolkit_activations():\n    return 2 * [Activation('a', lambda x: x)]",
        "it declares the activation 'a' twice",
    ),
}


def test_what_is_broken_is_told_and_harms_nobody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{name}.py", body) for name, (body, _) in BROKEN.items()]
    sound = write(tmp_path / "sound.py", BENT)
    loaded = Plugins([*files, sound])
    registry = Registry.from_plugins(loaded)
    told = capsys.readouterr().err.splitlines()
    for name, (_, reason) in BROKEN.items():
        info = loaded.infos[name]
        assert info.state == "broken"
        assert info.contact == f"mend {tmp_path / name}.py"
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(info.problem)
        assert f"warning: {info.problem}" in told
    assert loaded.infos["sound"].state == "loaded"
    assert registry.find("bent")[0] == "sound"
    assert registry.find("swish")[0] == "toolkit_builtin"
    with pytest.raises(UserError, match=r"unknown activation 'imported'.*plugin imports is broken: ModuleNotFoundError.*mend "):
        registry.find("imported")


def test_a_name_that_another_plugin_has(tmp_path: Path) -> None:
    loaded = Plugins([write(tmp_path / "triton.py", BENT), write(tmp_path / "sound.py", BENT)])
    assert loaded.infos["triton"].state == "loaded"
    taken = loaded.infos[f"triton ({tmp_path / 'triton.py'})"]
    assert taken.state == "broken"
    assert "the name 'triton' is that of another plugin" in taken.problem
    assert taken.problem.endswith("rename the file")
    registry = Registry.from_plugins(loaded)
    assert registry.find("triton/bent")[1].implementation is not None
    assert registry.find("sound/bent")[1].implementation is None


def test_names_that_two_claim_stay_unambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
        @hookimpl
        def toolkit_activations():
            return [Activation("swish", lambda x: x * x.sigmoid() + 0)]

        @hookimpl
        def toolkit_metrics():
            return [Measure("motion", lambda real, fake: 7.0), Measure("own", lambda real, fake: 7.0)]

        @hookimpl
        def toolkit_dataset_layouts():
            return {"folders": print}
    """
    monkeypatch.setenv(FILES_VARIABLE, str(write(tmp_path / "mine.py", body)))
    from toolkit.metrics import all_measures

    names = [m.name for m in all_measures()]
    assert {"motion", "mine/motion", "own"} <= set(names)
    assert len(set(names)) == len(names)
    layouts = plugins().mapping("toolkit_dataset_layouts")
    assert layouts["mine/folders"] is print
    assert layouts["folders"] is not print
    assert any("mine/motion" in n and f"mend {tmp_path / 'mine.py'}" in n for n in plugins().notices)
    registry = Registry.from_plugins(plugins())
    assert registry.find("swish")[0] == "toolkit_builtin"
    assert registry.find("mine/swish")[0] == "mine"
    assert registry.find("swish", prefer=["mine"])[0] == "mine"


def test_blocking_what_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert any("Did you mean 'triton'" in n for n in Plugins(block=["tritn"]).notices)
    assert "there is no plugin 'tritn' to block" in capsys.readouterr().err


def test_files_are_named_once(tmp_path: Path) -> None:
    file = write(tmp_path / "sub" / "bent_plugin.py", BENT)
    assert use_files(["sub/bent_plugin.py"], tmp_path) == [file]
    first = plugins()
    assert use_files([file], Path()) == [file]
    assert plugins() is first
    with pytest.raises(UserError, match="is not there"):
        use_files(["other.py"], tmp_path)


def test_a_config_names_plugins_from_its_own_folder(tmp_path: Path, puppets: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "configs" / "bent_plugin.py", BENT)
    config = {
        "plugins": ["bent_plugin.py"],
        "model": {"image_size": 32, "generator_width": 4, "discriminator_width": 4, "activations": {"generator": {"*": "bent"}}},
        "data": {"manifest": str(puppets.root), "batch_size": 8},
        "trainer": {"max_steps": 2, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    path = tmp_path / "configs" / "gan.yaml"
    path.write_text(yaml.safe_dump(config))
    assert run(["layers", str(path)]) == 0
    assert "bent_plugin" in capsys.readouterr().out
    os.environ[FILES_VARIABLE] = ""
    plugins.cache_clear()
    assert run(["gan", "fit", "--config", str(path), "--out", str(tmp_path / "run")]) == 0
    sites = json.loads((tmp_path / "run" / "sites.json").read_text())
    assert sites["generator"]["up1.act"] == "bent_plugin/bent"
    # The saved config lies elsewhere, and names the file all the same.
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["plugins"] == [str(tmp_path / "configs" / "bent_plugin.py")]


def small_study(folder: Path, data: Path, **more: object) -> Path:
    spec = {
        "name": "mine",
        "question": "?",
        "data": str(data),
        "seeds": [0],
        "generators": {"bent": {"*": "bent", "output": "tanh"}, "relu": {"*": "relu", "output": "tanh"}},
        "features": ["random"],
        "control": False,
        "audit": False,
        "robustness": False,
        "gan": {"max_steps": 4, "batch_size": 16, "validations": 1, "model": {"generator_width": 4, "discriminator_width": 4}},
        "detector": {"max_steps": 4, "batch_size": 16, "validations": 1, "model": {"backbone": "test_resnet"}},
        "clips": {"count": 10, "frames": 4, "keyframes": 2, "period": 8, "images": 24},
        **more,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def test_a_study_records_its_plugins(tmp_path: Path, puppets: Manifest) -> None:
    file = write(tmp_path / "bent_plugin.py", BENT)
    path = small_study(tmp_path, puppets.root, plugins=["bent_plugin.py"])

    def keys() -> dict[str, str]:
        plugins.cache_clear()
        return {f"{c.kind} {c.label}": c.key for c in Study(StudySpec.load(path), tmp_path / "out").cells()}

    before = keys()
    file.write_text(file.read_text() + "# another file now\n")
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {"gan bent", "quality bent", "detector bent", "detector relu"}


@pytest.mark.slow
def test_a_study_carries_its_plugins_to_its_workers(tmp_path: Path, puppets: Manifest) -> None:
    file = write(tmp_path / "bent_plugin.py", BENT)
    measure = EXAMPLES / "colourfulness.py"
    path = small_study(tmp_path, puppets.root, plugins=["bent_plugin.py", str(measure)])
    assert run(["study", "run", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "plugins").glob("*/*.py")} == {
        f.name: f.read_bytes() for f in (file, measure)
    }
    table = pd.read_parquet(tmp_path / "out" / "results.parquet")
    measured = table[(table["metric"] == "colourfulness") & table["generator"].isin(["bent", "relu"])]
    assert len(measured) >= 2
    assert np.isfinite(measured["value"]).all()
    assert "colourfulness" in (tmp_path / "out" / "report.html").read_text()


def test_the_example_of_a_measure() -> None:
    (plugin,) = [Plugins([EXAMPLES / "colourfulness.py"])]
    (measure,) = next(result for name, result in plugin.results("toolkit_metrics") if name == "colourfulness")
    assert isinstance(measure, Measure)
    from toolkit import ClipSet

    grey = ClipSet([np.full((1, 4, 4, 3), 90, np.uint8)])
    half = np.zeros((1, 4, 4, 3), np.uint8)
    half[:, :2] = (255, 0, 0)
    # rg is 255 or 0, yb 127.5 or 0, each half of the time.
    expected = np.hypot(127.5, 63.75) + 0.3 * np.hypot(127.5, 63.75)
    assert measure.function(grey, grey) == 0
    assert measure.function(grey, ClipSet([half])) == pytest.approx(expected)


def test_the_example_of_a_dataset_layout(tmp_path: Path, puppets: Manifest) -> None:
    clips, _ = load_frames(puppets, 32).clips(12)
    rows = ["path,identity,label,method,split"]
    for place, (name, label) in enumerate((("anna/one", "real"), ("ben/two", "real"), ("carl/three", "fake"))):
        write_video(tmp_path / "in" / f"{name}.webm", clips[place].repeat(4, axis=1).repeat(4, axis=2), 25)
        rows.append(f"{name}.webm,{name.split('/')[0]},{label},{'swap' if label == 'fake' else ''},{('train', 'val', 'test')[place]}")
    (tmp_path / "in" / "videos.csv").write_text("\n".join([*rows, "gone.webm,dora,real,,train"]) + "\n")
    os.environ[FILES_VARIABLE] = str(EXAMPLES / "video_table.py")
    arguments = ["data", "prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--layout", "table", "--faces", "none", "--frames", "4"]
    assert run(arguments) == 0
    table = Manifest.load(tmp_path / "out").table
    found = table.groupby("identity").first()[["label", "method", "split"]].to_dict("index")
    assert found == {
        "anna": {"label": "real", "method": "real", "split": "train"},
        "ben": {"label": "real", "method": "real", "split": "val"},
        "carl": {"label": "fake", "method": "swap", "split": "test"},
    }
    (tmp_path / "in" / "videos.csv").write_text("path,label\n")
    with pytest.raises(UserError, match=r"lacks the column\(s\) identity"):
        run([*arguments[:3], str(tmp_path / "again"), *arguments[4:]])


def test_the_example_of_a_command(tmp_path: Path, puppets: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ[FILES_VARIABLE] = str(EXAMPLES / "contact_sheet.py")
    assert run(["contact-sheet", str(puppets.root), str(tmp_path / "sheet.png"), "--faces", "3", "--size", "32"]) == 0
    people = puppets.table["identity"].nunique()
    assert f"{people} identities" in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "sheet.png"))
    assert picture is not None
    assert picture.shape == (people * 34 - 2, 3 * 34 - 2, 3)


def test_the_example_of_a_face_detector(real_data: Path) -> None:
    os.environ[FILES_VARIABLE] = str(EXAMPLES / "profile_faces.py")
    from toolkit.data.faces import face_detector

    name, detect = face_detector("profile")
    assert name == "profile"
    clip = sorted((real_data / "talking-heads").rglob("*.mp4"))[0]
    capture = cv2.VideoCapture(str(clip))
    ok, frame = capture.read()
    assert ok
    assert detect(frame)
    assert detect(np.full_like(frame, 128)) == []


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.linspace(-1, 1, 101)
    line = plot.braille(x, [x], width=10, height=5)
    assert line[0].startswith(" 1 ")
    assert line[4].startswith("-1 ")
    assert line[5].split() == ["-1", "1"]
    # A straight line: the first character of the last row and the last of the first have dots.
    assert line[4][3] != chr(0x2800)
    assert line[0][-1] != chr(0x2800)
    assert line[0][3] == chr(0x2800)
    assert plot.braille(x, [np.full(101, np.nan)]) == ["nothing here is finite"]
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".html", b"<")):
        assert run(["plugins", "show", "swish(beta=2)", "--out", str(tmp_path / f"swish{suffix}")]) == 0
        assert (tmp_path / f"swish{suffix}").read_bytes().startswith(start)
    assert "its derivative" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"ends in \.png"):
        run(["plugins", "show", "swish", "--out", str(tmp_path / "swish.bmp")])
    with pytest.raises(UserError, match="from a smaller number to a larger one"):
        run(["plugins", "show", "swish", "--range", "2", "1"])


def test_an_activation_of_a_plugin_is_one_of_the_public_class(tmp_path: Path) -> None:
    registry = Registry.from_plugins(Plugins([write(tmp_path / "sound.py", BENT)]))
    assert isinstance(registry.find("sound/bent")[1], Activation)
    assert registry.origins("triton/bent") == {"sound", "triton"}
    assert registry.origins("bent") == {"sound"}
