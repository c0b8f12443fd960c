"""The command itself: help, mistakes, speed, plugins, layers."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from toolkit import UserError
from toolkit.cli import COMMANDS, run
from toolkit.plugins import Plugins

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "toolkit", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["dmo"], ["--version"], []])
def test_nothing_heavy_is_imported_for_help_and_mistakes(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["toolkit", *{arguments!r}]
from toolkit.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {{"torch", "numpy", "pandas", "cv2", "pytorch_lightning", "timm", "rich", "yaml"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command() -> None:
    printed = command("--help")
    assert printed.returncode == 0
    assert all(f"  {name}" in printed.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", ["demo", "data", "detect", "study", "plugins", "layers", "bench", "gan", "detector"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) if name not in ("gan", "detector") else nothing():
        run([name, "--help"])
    assert "usage: toolkit" in capsys.readouterr().out


def nothing():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dmo"], "unknown command 'dmo'.*Did you mean 'demo'"),
        (["data", "prepair"], "invalid choice: 'prepair'"),
        (["study", "run", "/nowhere.yaml"], "is not there"),
        (["layers", "resnet19"], "neither a config file nor a timm backbone"),
        (["--plugin", "/nowhere.py", "plugins", "list"], "is not there"),
        (["bench", "step", "--sizes", "32", "--widths", "32", "64"], "same number"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    import re

    done = command(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


def test_layers_of_gan_detector_and_timm(capsys: pytest.CaptureFixture[str]) -> None:
    run(["layers", str(ROOT / "configs/gan/puppets32.yaml")])
    printed = capsys.readouterr().out
    assert "up1.act" in printed
    assert "128x4x4" in printed
    assert "down3.act" in printed
    assert "no rule can reach" not in printed
    run(["layers", str(ROOT / "configs/detector/residual_small.yaml")])
    printed = capsys.readouterr().out
    assert "layer4.0.act2" in printed
    assert "sigmoid" in printed
    run(["layers", "test_vit", "--image-size", "160"])
    assert "no rule can reach" in capsys.readouterr().out


def test_one_file_plugin_and_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "cube.py").write_text(
        textwrap.dedent("""
        from toolkit import Activation, Parameter, hookimpl

        @hookimpl
        def toolkit_activations():
            return [Activation("cube", lambda x, a: x + a * x**3, parameters={"a": Parameter(0.1)})]

        @hookimpl
        def toolkit_commands():
            return {"hello": (lambda argv: print("hello", *argv), "greet")}
    """)
    )
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "typo.py").write_text("from toolkit import hookimpl\n\n@hookimpl\ndef toolkit_activation():\n    return []\n")
    (tmp_path / "wrong.py").write_text("from toolkit import hookimpl\n\n@hookimpl\ndef toolkit_activations():\n    return 3\n")
    options = [part for name in ("cube", "broken", "typo", "wrong") for part in ("--plugin", str(tmp_path / f"{name}.py"))]
    printed = command(*options, "plugins", "list")
    assert printed.returncode == 0, printed.stderr
    assert "cube/cube" in printed.stdout
    assert "broken is broken: ModuleNotFoundError: No module named 'nothing_of_that_name'" in printed.stdout
    assert "unknown hook 'toolkit_activation'" in printed.stdout
    assert "must return a list of Activation" in printed.stdout
    assert "toolkit_builtin/swish" in printed.stdout
    assert command(*options[:2], "hello", "you").stdout == "hello you\n"
    blocked = command(*options[:2], "--block-plugin", "cube", "plugins", "list").stdout
    assert "blocked" in blocked
    assert "cube/cube" not in blocked


def test_a_blocked_plugin_is_named_where_it_is_missed() -> None:
    from toolkit.activations.registry import Registry

    registry = Registry.from_plugins(Plugins(block={"toolkit_builtin"}))
    with pytest.raises(UserError, match=r"unknown activation 'relu'.*plugin toolkit_builtin is blocked"):
        registry.find("relu")


def test_bench_alternates_and_reports_ratios() -> None:
    import time

    from toolkit.bench.timing import Variant, alternate, repeat

    order: list[str] = []

    def step(name: str, seconds: float) -> Variant:
        def work() -> None:
            order.append(name)
            time.sleep(seconds)

        return Variant(name, repeat(work))

    slow, fast = alternate([step("slow", 0.02), step("fast", 0.005)], images=10, rounds=3, seconds=0.06)
    assert slow.ratio == 1
    assert 2 < fast.ratio < 5
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes == 5  # three rounds of both, in turns
