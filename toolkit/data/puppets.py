"""The embedded data set: procedural talking faces with known identity, pose, mouth, blink and lighting.

No download, and the same pixels for the same seed. The faces are drawings, not photographs: good enough to exercise the
whole chain and to compare activations under known conditions, no substitute for real video.
"""

from __future__ import annotations

import argparse
import colorsys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from scipy.ndimage import convolve1d

from toolkit.data.layouts import VideoItem
from toolkit.data.manifest import COLUMNS, Manifest, assign_splits
from toolkit.errors import UserError
from toolkit.files import atomic

FPS = 25.0
TARGETS = ("yaw", "pitch", "roll", "mouth", "blink", "light")
_SUPERSAMPLE = 3


@dataclass(frozen=True)
class Identity:
    """What makes one puppet look different from the others. Lengths are shares of the image side, colours RGB in 0..1."""

    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    iris: tuple[float, float, float]
    shirt: tuple[float, float, float]
    background: tuple[float, float, float]
    face_width: float
    face_height: float
    jaw: float
    eye_distance: float
    eye_size: float
    brow_height: float
    brow_slant: float
    nose: float
    mouth_width: float
    lip: float
    fringe: float
    hair_length: float
    glasses: bool
    beard: float


@dataclass(frozen=True)
class State:
    """One moment of a puppet: angles in radians, ``mouth`` and ``blink`` in 0..1 (1 = open mouth, closed eyes),
    ``light`` the direction of the light in radians (0 from the right, growing clockwise)."""

    yaw: float
    pitch: float
    roll: float
    mouth: float
    blink: float
    light: float


def make_identity(seed: int) -> Identity:
    """Draw an identity; the same ``seed`` gives the same one."""
    rng = np.random.default_rng([seed, 0x1DE])
    u = rng.uniform
    tone = u(0, 1)
    skin = colorsys.hsv_to_rgb(u(0.04, 0.09), 0.25 + 0.4 * tone, 0.97 - 0.55 * tone)
    hair = colorsys.hsv_to_rgb(u(0.03, 0.13), u(0.2, 0.8), u(0.08, 0.75))
    return Identity(
        skin=skin,
        hair=hair,
        iris=colorsys.hsv_to_rgb(u(0.05, 0.65), u(0.3, 0.8), u(0.25, 0.6)),
        shirt=colorsys.hsv_to_rgb(u(0, 1), u(0.1, 0.7), u(0.2, 0.9)),
        background=colorsys.hsv_to_rgb(u(0, 1), u(0.02, 0.35), u(0.25, 0.9)),
        face_width=u(0.25, 0.31),
        face_height=u(0.33, 0.40),
        jaw=u(0.55, 0.95),
        eye_distance=u(0.105, 0.145),
        eye_size=u(0.040, 0.056),
        brow_height=u(0.055, 0.085),
        brow_slant=u(-0.02, 0.02),
        nose=u(0.07, 0.12),
        mouth_width=u(0.08, 0.13),
        lip=u(0.010, 0.022),
        fringe=u(0.35, 0.75),
        hair_length=u(0.0, 1.0),
        glasses=bool(u() < 0.2),
        beard=float(max(0.0, u(-1.2, 0.6))),
    )


def make_motion(frames: int, seed: int) -> list[State]:
    """A smooth performance of ``frames`` frames at 25 per second: head sway, speech, blinks every few seconds."""
    rng = np.random.default_rng([seed, 0x307])
    t = np.arange(frames) / FPS

    def sway(amplitude: float, slow: float, fast: float) -> np.ndarray:
        rates, phases = rng.uniform(slow, fast, 3), rng.uniform(0, 2 * np.pi, 3)
        weights = rng.dirichlet(np.ones(3))
        return amplitude * sum(w * np.sin(2 * np.pi * r * t + p) for w, r, p in zip(weights, rates, phases, strict=True))

    speech = np.clip(sway(1.2, 1.5, 4.5) + 0.15, 0, 1) * (sway(1.0, 0.15, 0.5) > -0.35)
    kernel = np.hanning(7) / np.hanning(7).sum()
    mouth = np.clip(convolve1d(speech, kernel, mode="constant"), 0, 1)
    blink = np.zeros(frames)
    moment = rng.uniform(0.2, 2.0)
    while moment < frames / FPS:
        blink = np.maximum(blink, np.exp(-(((t - moment) / 0.07) ** 2)))
        moment += rng.uniform(1.2, 4.0)
    yaw, pitch, roll = sway(0.55, 0.1, 0.6), sway(0.25, 0.1, 0.7), sway(0.18, 0.1, 0.5)
    light = rng.uniform(0, 2 * np.pi) + sway(0.8, 0.03, 0.12)
    return [State(*map(float, row)) for row in zip(yaw, pitch, roll, mouth, blink, light, strict=True)]


class _Canvas:
    """Filled shapes with soft edges, in coordinates where the image is the square [-0.5, 0.5]^2 and y points down."""

    def __init__(self, size: int, background: tuple[float, float, float]) -> None:
        self.side = size * _SUPERSAMPLE
        self.pixels = np.empty((self.side, self.side, 3), np.float32)
        ramp = np.linspace(1.08, 0.86, self.side, dtype=np.float32)[:, None, None]
        self.pixels[:] = np.asarray(background, np.float32) * ramp

    def polygon(self, points: np.ndarray, colour: tuple[float, ...] | np.ndarray, alpha: float = 1.0) -> None:
        shift = 4
        where = np.round((points + 0.5) * self.side * (1 << shift)).astype(np.int32)
        if alpha >= 1:
            cv2.fillPoly(self.pixels, [where], tuple(map(float, colour)), cv2.LINE_AA, shift)
            return
        layer = self.pixels.copy()
        cv2.fillPoly(layer, [where], tuple(map(float, colour)), cv2.LINE_AA, shift)
        self.pixels = (1 - alpha) * self.pixels + alpha * layer


def _ellipse(x: float, y: float, rx: float, ry: float, lower: float = 1.0) -> np.ndarray:
    """An ellipse around (x, y); its lower half is narrowed towards the bottom by ``lower`` (a chin)."""
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    px, py = np.cos(angle), np.sin(angle)
    px = np.where(py > 0, px * (1 - (1 - lower) * py**2 * 0.6), px)
    return np.stack([x + rx * px, y + ry * py], axis=1)


def render(identity: Identity, state: State, size: int) -> np.ndarray:
    """Draw one frame as ``(size, size, 3)`` uint8 RGB."""
    who = identity
    canvas = _Canvas(size, who.background)
    cos, sin = np.cos(state.roll), np.sin(state.roll)

    def turn(points: np.ndarray) -> np.ndarray:
        return np.stack([points[:, 0] * cos - points[:, 1] * sin, points[:, 0] * sin + points[:, 1] * cos], axis=1)

    def on_face(x: float, y: float) -> tuple[float, float, float]:
        """Turn a point of the frontal face by yaw and pitch on an ellipsoid; returns its place and its width factor."""
        around = np.arcsin(np.clip(x / who.face_width, -0.95, 0.95)) + state.yaw
        up = np.arcsin(np.clip(y / who.face_height, -0.95, 0.95)) + state.pitch
        return (
            who.face_width * float(np.sin(around)),
            who.face_height * float(np.sin(up)),
            float(max(0.15, np.cos(around))),
        )

    skin = np.asarray(who.skin)
    hair = np.asarray(who.hair)
    shift = 0.25 * state.yaw * who.face_width
    canvas.polygon(np.array([[-0.42, 0.52], [-0.27, 0.36], [-0.08, 0.33], [0.08, 0.33], [0.27, 0.36], [0.42, 0.52]]), who.shirt)
    canvas.polygon(
        turn(
            _ellipse(-0.4 * shift, -0.04 + 0.18 * who.hair_length, who.face_width * 1.22, who.face_height * (1.08 + 0.25 * who.hair_length))
        ),
        hair * 0.8,
    )
    canvas.polygon(np.array([[-0.09, 0.2], [0.09, 0.2], [0.1, 0.37], [0.0, 0.42], [-0.1, 0.37]]), skin * 0.82)
    for side in (-1, 1):
        ear = side * who.face_width * (1 - 0.25 * max(0.0, side * state.yaw))
        canvas.polygon(turn(_ellipse(ear, 0.0, 0.035, 0.06)), skin * 0.88)
    head = turn(_ellipse(0.0, 0.0, who.face_width, who.face_height, who.jaw))
    canvas.polygon(head, skin)
    cheek_x, cheek_y, _ = on_face(0.0, 0.12)
    canvas.polygon(turn(_ellipse(cheek_x, cheek_y, who.face_width * 0.8, who.face_height * 0.45)), skin * [1.03, 0.98, 0.97], 0.35)
    if who.beard > 0:
        x, y, _ = on_face(0.0, 0.25)
        canvas.polygon(turn(_ellipse(x, y, who.face_width * 0.75, who.face_height * 0.42, 0.9)), hair, min(0.85, 0.3 + who.beard))
    for side in (-1, 1):
        x, y, narrow = on_face(side * who.eye_distance, -0.06)
        open_ = max(0.06, 1 - state.blink)
        rx, ry = who.eye_size * narrow, who.eye_size * 0.62 * open_
        canvas.polygon(turn(_ellipse(x, y - 0.012, rx * 1.25, who.eye_size * 0.85)), skin * 0.9, 0.6)
        canvas.polygon(turn(_ellipse(x, y, rx, ry)), (0.95, 0.95, 0.94))
        iris = min(who.eye_size * 0.5, ry)
        gaze = 0.35 * state.yaw * who.eye_size
        canvas.polygon(turn(_ellipse(x + gaze, y, iris * narrow, iris)), who.iris)
        canvas.polygon(turn(_ellipse(x + gaze, y, iris * 0.5 * narrow, iris * 0.5)), (0.04, 0.04, 0.05))
        canvas.polygon(turn(_ellipse(x, y - ry, rx * 1.05, 0.008)), skin * 0.45)
        bx, by, _ = on_face(side * who.eye_distance, -0.06 - who.brow_height)
        half, slant = who.eye_size * 1.3 * narrow, side * who.brow_slant
        brow = np.array(
            [
                [bx - half, by + slant],
                [bx, by - 0.012],
                [bx + half, by - slant],
                [bx + half, by - slant + 0.014],
                [bx, by + 0.006],
                [bx - half, by + slant + 0.014],
            ]
        )
        canvas.polygon(turn(brow), hair * 0.7)
        if who.glasses:
            ring = _ellipse(x, y, who.eye_size * 1.55 * narrow, who.eye_size * 1.3)
            where = np.round((turn(ring) + 0.5) * canvas.side * 16).astype(np.int32)
            cv2.polylines(canvas.pixels, [where], True, (0.08, 0.08, 0.1), max(1, canvas.side // 90), cv2.LINE_AA, 4)
    bridge_x, bridge_y, _ = on_face(0.0, -0.03)
    tip_x, tip_y, _ = on_face(0.0, who.nose * 0.75)
    tip_x += 0.12 * state.yaw * who.nose * 2
    canvas.polygon(
        turn(
            np.array(
                [
                    [bridge_x - 0.012, bridge_y],
                    [bridge_x + 0.012, bridge_y],
                    [tip_x + 0.035, tip_y],
                    [tip_x, tip_y + 0.02],
                    [tip_x - 0.035, tip_y],
                ]
            )
        ),
        skin * 0.86,
    )
    canvas.polygon(turn(_ellipse(tip_x, tip_y - 0.004, 0.02, 0.016)), np.minimum(skin * 1.1, 1))
    mx, my, narrow = on_face(0.0, 0.19)
    width = who.mouth_width * narrow * (1 - 0.25 * state.mouth)
    gap = 0.006 + 0.055 * state.mouth
    lips = np.clip(skin * [0.95, 0.58, 0.58], 0, 1)
    canvas.polygon(turn(_ellipse(mx, my + gap * 0.4, width, gap + who.lip)), lips)
    canvas.polygon(turn(_ellipse(mx, my + gap * 0.4, width * 0.85, gap)), (0.16, 0.05, 0.06))
    if state.mouth > 0.25:
        canvas.polygon(turn(_ellipse(mx, my - gap * 0.35, width * 0.6, gap * 0.35)), (0.93, 0.92, 0.88))
    top = _ellipse(0.15 * shift, -who.face_height * 0.62, who.face_width * 1.08, who.face_height * 0.56)
    line = -who.face_height * who.fringe
    fringe = np.clip(line + 0.35 * (np.abs(top[:, 0]) / who.face_width) ** 2 * who.face_height, line, 0)
    top[:, 1] = np.minimum(top[:, 1], fringe)
    canvas.polygon(turn(top), hair)
    return _shade(canvas.pixels, state.light, size)


def _shade(pixels: np.ndarray, light: float, size: int) -> np.ndarray:
    """Light the drawing from one side and reduce it to its final size."""
    small = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    ramp = 1.0 + 0.38 * (np.cos(light) * axis[None, :] + np.sin(light) * axis[:, None])
    vignette = 1.0 - 0.25 * (axis[None, :] ** 2 + axis[:, None] ** 2)
    shaded: np.ndarray = (np.clip(small * (ramp * vignette)[..., None], 0, 1) * 255).round().astype(np.uint8)
    return shaded


def make_puppets(out: Path, *, identities: int = 40, clips: int = 2, frames: int = 48, size: int = 64, seed: int = 0) -> Manifest:
    """Render a dataset of real clips, split by identity; a finished one with the same arguments is left as it is.

    Args:
        out: where frames and ``manifest.csv`` go.
        identities: number of different people, at least 3.
        clips: clips of each person.
        frames: consecutive frames per clip, at 25 per second.
        size: side in pixels.
        seed: of everything.

    Raises:
        UserError: a number is too small.
    """
    from rich.progress import track

    from toolkit.console import console
    from toolkit.files import read_json, write_json

    for name, value, least in (
        ("identities", identities, 3),
        ("clips", clips, 1),
        ("frames", frames, 1),
        ("size", size, 16),
    ):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")
    arguments = {"identities": identities, "clips": clips, "frames": frames, "size": size, "seed": seed}
    done = out / "puppets.json"
    if done.is_file() and read_json(done) == arguments:
        return Manifest.load(out)
    items = [
        VideoItem(Path(), f"puppets/p{person:03d}/c{clip}", f"p{person:03d}", source=f"p{person:03d}/c{clip}")
        for person in range(identities)
        for clip in range(clips)
    ]
    items, _ = assign_splits(items, seed=seed)
    rows = []
    for item in track(items, "rendering puppets", console=console, transient=True):
        person, clip = int(item.identity[1:]), int(item.video.rsplit("c", 1)[1])
        who = make_identity(seed * 100_003 + person)
        for index, state in enumerate(make_motion(frames, (seed * 100_003 + person) * 101 + clip)):
            name = f"frames/{item.video.removeprefix('puppets/').replace('/', '_')}/{index:06d}.png"
            with atomic(out / name) as temporary:
                cv2.imwrite(str(temporary), cv2.cvtColor(render(who, state, size), cv2.COLOR_RGB2BGR))
            rows.append(
                {
                    "frame": name,
                    "video": item.video,
                    "identity": item.identity,
                    "label": "real",
                    "method": "real",
                    "source": item.source,
                    "split": item.split,
                    "index": index,
                    "time_s": round(index / FPS, 4),
                    "box": f"0 0 {size} {size}",
                    **{t: round(getattr(state, t), 5) for t in TARGETS},
                }
            )
    manifest = Manifest(out, pd.DataFrame(rows)[[*COLUMNS, *TARGETS]])
    manifest.check()
    manifest.save()
    write_json(done, arguments)
    return manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``toolkit data puppets``."""
    parser.add_argument("out", type=Path, help="where frames and manifest.csv go")
    parser.add_argument("--identities", type=int, default=40, help="number of people (default %(default)s)")
    parser.add_argument("--clips", type=int, default=2, help="clips of each person (default %(default)s)")
    parser.add_argument("--frames", type=int, default=48, help="frames per clip, 25 per second (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run ``toolkit data puppets``."""
    from toolkit.console import console, print_table

    manifest = make_puppets(args.out, identities=args.identities, clips=args.clips, frames=args.frames, size=args.size, seed=args.seed)
    print_table("frames", manifest.summary())
    console.print(f"manifest: {manifest.root / 'manifest.csv'}")
    return 0
