"""Whatever a user or a broken disk hands over: one line that says what is wrong, status 2, nothing lost, nothing outside the folder."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import av
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit import ActivationSpec, Manifest, UserError, apply_rules
from toolkit.cli import run
from toolkit.data.audit import audit_manifests, file_facts
from toolkit.data.frames import load_frames
from toolkit.data.layouts import VideoItem
from toolkit.data.prepare import PARTLY_DONE, Settings, prepare_video
from toolkit.data.puppets import make_identity, make_motion, render
from toolkit.data.video import VideoError, VideoReader, count_frames, read_image, write_video
from toolkit.detector.module import Detector
from toolkit.gan.module import GAN
from toolkit.gan.networks import Generator
from toolkit.study.spec import StudySpec

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
TINY = {"image_size": 16, "latent": 8, "generator_width": 4, "discriminator_width": 4}


def outcome(call: Callable[[], T]) -> T | str:
    """What the call returns, or the message of its :class:`UserError`, which must be one line."""
    try:
        return call()
    except UserError as error:
        message = str(error)
    if "\n" in message or not message:
        pytest.fail(f"not one line: {message!r}")
    return message


def clip(size: int = 48, frames: int = 12) -> np.ndarray:
    who = make_identity(1)
    return np.stack([render(who, state, size) for state in make_motion(frames, 1)])


def checkpoint(path: Path) -> Path:
    import pytorch_lightning as pl

    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(GAN(**TINY))
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GAN's checkpoint that is fine."""
    return checkpoint(tmp_path_factory.mktemp("good") / "gan.ckpt")


# --- video and images -------------------------------------------------------------------------------------------------


def of_two_sizes(path: Path) -> Path:
    """A transport stream whose picture changes its size in the middle."""
    parts = []
    for size in (64, 96):
        part = path.with_suffix(f".{size}.ts")
        with av.open(str(part), "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            for frame in clip(size, 15):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))
    return path


def test_a_video_whose_size_changes_gives_its_frames(tmp_path: Path) -> None:
    source = of_two_sizes(tmp_path / "two.ts")
    with VideoReader(source) as reader:
        assert len(list(reader)) >= 25
    record = prepare_video(VideoItem(source, "two", "two"), tmp_path / "out", Settings("none", 30, 5, 32), None)
    assert record["error"] == ""
    assert len(record["rows"]) >= 15
    assert {read_image(tmp_path / "out" / row["frame"]).shape for row in record["rows"]} == {(32, 32, 3)}


def test_hours_of_video_are_sampled_without_being_held(tmp_path: Path) -> None:
    source = tmp_path / "long.webm"
    frames = clip(32, 10)
    write_video(source, (frames[i % 10] for i in range(7200)), fps=1)  # two hours
    record = prepare_video(VideoItem(source, "long", "long"), tmp_path / "out", Settings("none", 6, 1, 32), None)
    times = [row["time_s"] for row in record["rows"]]
    assert len(times) == 6
    assert times[0] < 700
    assert times[-1] > 6400


def test_a_folder_of_odd_images_gives_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "videos" / "person"
    folder.mkdir(parents=True)
    face = clip(64, 1)[0]
    kinds = {
        "0.png": cv2.cvtColor(face, cv2.COLOR_RGB2GRAY),
        "1.png": cv2.cvtColor(face, cv2.COLOR_RGB2BGRA),
        "2.png": face.astype(np.uint16) * 257,
        "3.png": cv2.resize(face, (63, 101)),
        "4.png": face[:1, :1],
    }
    for name, image in kinds.items():
        assert cv2.imwrite(str(folder / name), image)
    (folder / "5.jpg").write_bytes((folder / "0.png").read_bytes())  # a PNG by another name
    (folder / "6.png").write_bytes(b"no image")
    (folder / "7.png").write_bytes(b"")
    out = tmp_path / "out"
    status = run(["data", "prepare", str(tmp_path / "videos"), str(out), "--layout", "folders", "--faces", "none", "--size", "32"])
    assert status == PARTLY_DONE
    assert "used in part: " in capsys.readouterr().err
    manifest = Manifest.load(out)
    assert len(manifest.table) == 6
    assert {read_image(p).shape for p in manifest.paths()} == {(32, 32, 3)}
    sixteen = read_image(folder / "2.png")
    assert np.abs(sixteen.astype(int) - face).max() <= 1  # scaled, not cut off


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.mp4", b"", "the file is empty"),
        ("text.mp4", b"this is not a video", "not a video that can be decoded"),
        ("picture.mp4", "png", "a PNG image under the name of a video"),
        ("cut.webm", "cut", "decoded"),
        ("random.avi", bytes(random.Random(0).randbytes(5000)), "not a video that can be decoded"),
    ],
)
def test_videos_that_are_none_are_left_out_with_the_reason(
    tmp_path: Path, name: str, content: bytes | str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    write_video(source / "fine.webm", clip(), 25)
    if content == "png":
        content = cv2.imencode(".png", clip(frames=1)[0])[1].tobytes()
    elif content == "cut":
        content = (source / "fine.webm").read_bytes()[:600]
    assert isinstance(content, bytes)
    (source / name).write_bytes(content)
    arguments = ["data", "prepare", str(source), str(tmp_path / "out"), "--layout", "folders", "--faces", "none", "--workers", "1"]
    assert run(arguments) == PARTLY_DONE
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines  # nothing from the decoders, which have their own way of saying it
    assert lines[0].startswith("left out: ")
    assert reason in lines[0]
    assert Manifest.load(tmp_path / "out").table["video"].nunique() == 1


def test_a_video_without_a_face_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "videos" / "grey.webm", np.full((8, 64, 64, 3), 128, np.uint8), 25)
    with pytest.raises(UserError, match="no face was found in any frame"):
        run(
            ["data", "prepare", str(tmp_path / "videos"), str(tmp_path / "out"), "--layout", "folders", "--faces", "haar", "--workers", "1"]
        )
    assert not (tmp_path / "out" / "manifest.csv").exists()


def test_a_video_that_ends_early_is_used_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """AVI keeps its index and length where a cut at the end leaves the length standing."""
    source = tmp_path / "videos" / "person.mkv"
    source.parent.mkdir()
    with av.open(str(source), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "5"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    arguments = ["data", "prepare", str(source.parent), str(tmp_path / "out"), "--layout", "folders", "--faces", "none", "--workers", "1"]
    status = run([*arguments, "--frames", "60"])
    rows = Manifest.load(tmp_path / "out").table
    assert 10 < len(rows) < 60
    err = capsys.readouterr().err
    assert status == PARTLY_DONE
    assert "used in part" in err
    assert "damaged or cut off" in err


def mutated(data: bytes, seed: int, changes: int) -> bytes:
    """``data`` with bytes changed, cut out and doubled."""
    rng, result = random.Random(seed), bytearray(data)
    for _ in range(changes):
        place = rng.randrange(len(result))
        kind = rng.randrange(4)
        if kind == 0:
            result[place] = rng.randrange(256)
        elif kind == 1:
            del result[place : place + rng.randrange(1, 64)]
        elif kind == 2:
            result[place:place] = result[place : place + rng.randrange(1, 64)]
        else:
            del result[rng.randrange(len(result) // 2, len(result)) :]
        if len(result) < 8:
            return bytes(result)
    return bytes(result)


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def webm(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("webm") / "a.webm"
    write_video(path, clip(), 25)
    return path.read_bytes()


@FUZZ
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 30))
def test_fuzzed_videos_are_read_or_refused(webm: bytes, tmp_path: Path, seed: int, changes: int) -> None:
    path = tmp_path / "v.webm"
    path.write_bytes(mutated(webm, seed, changes))
    with contextlib.suppress(VideoError):
        assert 0 <= count_frames(path) <= 10_000
    record = prepare_video(VideoItem(path, f"v{seed}", "v"), tmp_path / "out", Settings("none", 4, 2, 16), None)
    assert record["rows"] or record["error"]


@FUZZ
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 10), suffix=st.sampled_from([".png", ".jpg", ".webp", ".tiff", ".bmp"]))
def test_fuzzed_images_are_read_or_refused(tmp_path: Path, seed: int, changes: int, suffix: str) -> None:
    path = tmp_path / f"i{suffix}"
    path.write_bytes(mutated(cv2.imencode(suffix, clip(24, 1)[0])[1].tobytes(), seed, changes))
    for read in (read_image, file_facts):
        try:
            found = read(path)
        except VideoError:
            continue
        if isinstance(found, np.ndarray):
            assert found.dtype == np.uint8
            assert found.shape[2] == 3


# --- manifests --------------------------------------------------------------------------------------------------------


@FUZZ
@given(data=st.data())
def test_fuzzed_manifests_are_sound_or_refused(puppets: Manifest, tmp_path: Path, data: st.DataObject) -> None:
    table = puppets.table.head(20).astype(str)
    text = table.to_csv(index=False)
    kind = data.draw(st.sampled_from(["cell", "bytes", "column", "row"]))
    if kind == "cell":
        odd = st.sampled_from(
            ["", "..", "../../etc/passwd", "/etc/passwd", "nan", "-1", "1e400", "fake", "test", "a+b", "\x00", "x" * 5000, "é"]
        )
        for _ in range(data.draw(st.integers(1, 4))):
            row, column = data.draw(st.integers(0, 19)), data.draw(st.integers(0, len(table.columns) - 1))
            table.iloc[row, column] = data.draw(odd)
        raw = table.to_csv(index=False).encode()
    elif kind == "column":
        raw = table.drop(columns=data.draw(st.sampled_from(list(table.columns)))).to_csv(index=False).encode()
    elif kind == "row":
        raw = pd.concat([table, table.sample(5, random_state=0)]).to_csv(index=False).encode()
    else:
        raw = mutated(text.encode(), data.draw(st.integers(0, 2**32)), data.draw(st.integers(1, 20)))
    (tmp_path / "manifest.csv").write_bytes(raw)
    manifest = outcome(lambda: Manifest.load(tmp_path, check_files=False))
    if isinstance(manifest, str):
        return
    assert all(p.resolve().is_relative_to(tmp_path.resolve()) for p in manifest.paths())
    assert set(manifest.table["label"]) <= {"real", "fake"}
    assert set(manifest.table["split"]) <= {"train", "val", "test", ""}


@pytest.mark.parametrize("place", ["../outside.png", "/etc/passwd", "frames/../../outside.png"])
def test_a_manifest_that_points_outside_is_refused_everywhere(puppets: Manifest, tmp_path: Path, place: str) -> None:
    table = puppets.table.copy()
    table.loc[0, "frame"] = place
    (tmp_path / "set").mkdir()
    Manifest(tmp_path / "set", table).save()
    for call in (
        lambda: audit_manifests([str(tmp_path / "set")]),
        lambda: load_frames(Manifest.load(tmp_path / "set"), 32),
        lambda: run(["gan", "fit", "--data.manifest", str(tmp_path / "set"), "--out", str(tmp_path / "out")]),
    ):
        with pytest.raises(UserError, match="lies outside of the dataset's folder"):
            call()
    assert not (tmp_path / "out" / "checkpoints").exists()


# --- rules and configs ------------------------------------------------------------------------------------------------


@FUZZ
@given(st.text(max_size=60))
def test_any_text_is_an_activation_or_one_line(text: str) -> None:
    spec = outcome(lambda: ActivationSpec.parse(text))
    assert isinstance(spec, str) or ActivationSpec.parse(str(spec)) == spec


PATTERNS = st.one_of(st.text(max_size=12), st.sampled_from(["*", "up*", "up[12].act", "up[", "[!", "output", "**", "up1.act"]))
VALUES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["relu", "tanh", "swish(beta=2)", "swish(beta=", "snake(a=0)", "softmax", "toolkit_builtin/elu", "prelu(per_channel=true)"]
    ),
    st.dictionaries(st.sampled_from(["name", "beta", "learn", "x"]), st.one_of(st.none(), st.floats(), st.text(max_size=5)), max_size=3),
    st.none(),
    st.integers(),
    st.lists(st.integers(), max_size=2),
)


@FUZZ
@given(st.dictionaries(PATTERNS, VALUES, max_size=3))
def test_any_rules_apply_or_say_why_in_a_line(rules: dict[str, object]) -> None:
    generator = Generator(16, 8, 4)
    if not isinstance(outcome(lambda: apply_rules(generator, rules, example=generator.example())), str):
        assert torch.isfinite(generator.eval()(generator.example())).all()


STUDY = yaml.safe_load((ROOT / "configs" / "studies" / "first_look.yaml").read_text())
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2), st.just({"a": 1})
)


@FUZZ
@given(data=st.data())
def test_fuzzed_studies_load_or_say_why_in_a_line(tmp_path: Path, data: st.DataObject) -> None:
    spec = yaml.safe_load(yaml.safe_dump(STUDY))
    for _ in range(data.draw(st.integers(1, 3))):
        place = spec
        while True:
            key = data.draw(st.sampled_from([*place, "nonsense"]))
            if isinstance(place.get(key), dict) and place[key] and data.draw(st.booleans()):
                place = place[key]
                continue
            place[key] = data.draw(JUNK)
            break
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(spec))
    outcome(lambda: StudySpec.load(path))


@FUZZ
@given(raw=st.binary(max_size=200))
def test_a_study_of_any_bytes_is_refused_in_a_line(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "s.yaml").write_bytes(raw)
    with pytest.raises(UserError) as caught:
        StudySpec.load(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: [1, 2", "parsing"),
        (b"modell: {latent: 3}", "modell"),
        (b"model: {latnt: 3}", "latnt"),
        (b"model: {latent: many}", "latent"),
        (b"\x8c\x00\xff", "not a text file"),
        (b"- 1\n- 2\n", ""),
        (b"model: {activations: {generator: {'upp*': relu}}}", "matches no site"),
        (b"model: {activations: {generator: {'*': rulu}}}", "Did you mean 'relu'"),
        (b"model: {activations: {generator: {'*': 'swish(bta=1)'}}}", "no parameter 'bta'"),
        (b"model: {activations: {genrator: {'*': relu}}}", "unknown network 'genrator'"),
    ],
)
def test_bad_configs_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, puppets: Manifest, text: bytes, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(UserError, match=message) as caught:
        run(["gan", "fit", "--config", "c.yaml", "--data.manifest", str(puppets.root), "--out", "out"])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert {p.name for p in tmp_path.iterdir()} <= {"c.yaml", "out"}


# --- checkpoints ------------------------------------------------------------------------------------------------------


@FUZZ
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 20))
def test_fuzzed_checkpoints_load_or_are_refused(good: Path, tmp_path: Path, seed: int, changes: int) -> None:
    path = tmp_path / "c.ckpt"
    path.write_bytes(mutated(good.read_bytes(), seed, changes))
    outcome(lambda: GAN.from_checkpoint(path))


ODD = st.sampled_from([None, -3, 0, 10**9, "x", [], {}, True, float("nan")])


@FUZZ
@given(data=st.data())
def test_checkpoints_with_odd_options_are_refused(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = torch.load(good, weights_only=True)
    options = content["toolkit"]["options"]
    place, key = data.draw(
        st.sampled_from([(content, "toolkit"), (content, "state_dict"), (content["toolkit"], "options"), *[(options, k) for k in options]])
    )
    place[key] = data.draw(ODD)
    torch.save(content, tmp_path / "c.ckpt")
    outcome(lambda: GAN.from_checkpoint(tmp_path / "c.ckpt"))


class Payload:
    """What a pickle would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_payload_is_never_run(tmp_path: Path, good: Path, puppets: Manifest) -> None:
    mark = tmp_path / "ran"
    content = torch.load(good, weights_only=True)
    torch.save({**content, "extra": Payload(mark)}, tmp_path / "evil.ckpt")
    evil = str(tmp_path / "evil.ckpt")
    write_video(tmp_path / "v.webm", clip(), 25)
    for arguments in (
        ["gan", "sample", evil, str(tmp_path / "s")],
        ["gan", "fit", "--data.manifest", str(puppets.root), "--ckpt_path", evil, "--out", str(tmp_path / "o")],
        ["gan", "test", "--data.manifest", str(puppets.root), "--ckpt_path", evil, "--out", str(tmp_path / "o")],
        ["detect", str(tmp_path / "v.webm"), "--checkpoint", evil],
        ["detector", "robustness", evil, str(puppets.root)],
    ):
        with pytest.raises(UserError, match="cannot be loaded as a checkpoint"):
            run(arguments)
        assert not mark.exists(), arguments


def test_a_checkpoint_of_another_architecture_is_refused_before_anything_is_done(tmp_path: Path, good: Path, puppets: Manifest) -> None:
    arguments = ["gan", "fit", "--data.manifest", str(puppets.root), "--out", str(tmp_path / "o"), "--ckpt_path", str(good)]
    other = ["--model.image_size", "16", "--model.latent", "8", "--model.generator_width", "8", "--model.discriminator_width", "4"]
    with pytest.raises(UserError, match=r"another architecture: the weight generator\.\S+ is \(8, .* there and \(8, .* here") as caught:
        run([*arguments, *other])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o" / "checkpoints").exists()
    with pytest.raises(UserError, match="is a gan checkpoint; a detector checkpoint is needed"):
        Detector.from_checkpoint(good)
    with pytest.raises(UserError, match="is not there"):
        run([*arguments[:-1], str(tmp_path / "none.ckpt")])


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=False)


def toolkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "toolkit", *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(small_disk: Path, puppets: Manifest) -> None:
    out = small_disk / "run"
    small = [
        "--model.generator_width",
        "8",
        "--model.discriminator_width",
        "8",
        "--model.validation_images",
        "16",
        "--samples.every",
        "100",
    ]
    steps = ["--trainer.max_steps", "12", "--trainer.val_check_interval", "4", "--data.batch_size", "16", "--trainer.logger", "false"]
    config = ["--config", str(ROOT / "configs/gan/puppets32.yaml"), "--data.manifest", str(puppets.root)]
    command = ["gan", "fit", *config, *small, *steps, "--trainer.enable_progress_bar", "false", "--out", str(out)]
    full = toolkit(*command)
    assert full.returncode == 2, full.stderr
    lines = [line for line in full.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, full.stderr
    assert "the disk is full" in lines[0]
    assert not list(out.rglob("*.tmp*"))  # what could not be finished does not go on taking room
    for path in out.rglob("*.ckpt"):
        torch.load(path, weights_only=True)
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    again = toolkit(*command, "--ckpt_path", "last")
    assert again.returncode == 0, again.stderr
    assert torch.load(out / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 12


def test_a_video_on_a_full_disk_is_not_taken_for_whole(small_disk: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (250, 256, 256, 3), dtype=np.uint8)
    with pytest.raises(OSError, match="No space left"):
        write_video(small_disk / "v.webm", noise, 25)
    assert not list(small_disk.iterdir())


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("in the way")
        target = tmp_path / "file" / "data"
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        target = tmp_path / "locked" / "data"
    done = toolkit("data", "puppets", str(target), "--identities", "3", "--frames", "2")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("toolkit: error: ")
