"""A plugin made by `toolkit plugins new`: it installs with pip, and its tests pass as written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.cli import run
from toolkit.errors import UserError


@pytest.mark.slow
def test_a_new_plugin_installs_and_its_tests_pass(tmp_path: Path) -> None:
    assert run(["plugins", "new", "bent_line", "--out", str(tmp_path / "bent")]) == 0
    # Its own folder in place of an environment; the toolkit that it depends on is the one that runs this test.
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(tmp_path / "bent")]
    subprocess.run(install, check=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(tests, cwd=tmp_path / "bent", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 passed" in done.stdout
    shown = [sys.executable, "-c", "from toolkit.cli import main; main()", "plugins", "show", "bent_line"]
    done = subprocess.run(shown, env=env, capture_output=True, text=True, check=True)
    assert "bent_line, triton" in done.stdout


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="is there already, and nothing in it is overwritten"):
        run(["plugins", "new", "bent_line", "--out", str(tmp_path / "mine")])
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["notes.txt"]
    assert run(["plugins", "new", "bent_line", "--out", str(tmp_path / "empty")]) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [("swish", "already"), ("triton", "already"), ("My-Act", "identifier"), ("class", "identifier"), ("Upper", "lower case")],
)
def test_names_that_cannot_be(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        run(["plugins", "new", name, "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
