"""plugins/README.md, followed word for word in an environment of its own: every command, every file."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import time
import venv
from pathlib import Path

import pandas as pd
import pytest

PAGE = Path(__file__).resolve().parents[1] / "plugins" / "README.md"


def blocks() -> list[tuple[str, str]]:
    """Language and text of every fenced block of the page; one without a language is output, for reading."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_every_block_is_a_command_or_a_named_file() -> None:
    for language, text in blocks():
        assert language in ("bash", "python", "yaml"), text
        assert language == "bash" or re.match(r"# [\w./]+\.(py|yaml)\n", text), text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_word_for_word(tmp_path: Path) -> None:
    # pip installs the plugin here; the toolkit and all else come from the environment of the tests.
    place = tmp_path / "environment"
    venv.create(place, with_pip=True)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "tests_own.pth").write_text(
        sysconfig.get_path("purelib") + "\nimport site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")\n"
    )
    for name, code in (("toolkit", "from toolkit.cli import main"), ("pytest", "from pytest import console_main as main")):
        (place / "bin" / name).write_text(
            f"#!{place / 'bin' / 'python'}\n{code}\n\nif __name__ == '__main__':\n    raise SystemExit(main())\n"
        )
        (place / "bin" / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    env = {**os.environ, "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env.pop("PYTHONPATH", None)
    printed = ""
    for language, text in blocks():
        if language == "bash":
            began = time.monotonic()
            done = subprocess.run(["bash", "-euc", text], cwd=work, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            printed += done.stdout
            print(f"{time.monotonic() - began:.0f} s: {text}")
        else:
            file = work / text.split("\n", 1)[0].removeprefix("# ")
            # A file in a folder takes the place of one that `toolkit plugins new` wrote.
            assert file.parent == work or file.is_file()
            file.write_text(text)
    assert (work / "bent_line.png").is_file()
    assert "providers of its name agree" in printed
    assert "FAIL" not in printed
    assert "1 passed" in printed
    assert (work / "clips" / "grid.png").is_file()
    table = pd.read_parquet(work / "runs" / "study" / "results.parquet")
    assert {"relu", "bent_line"} <= set(table["generator"])
    assert "deepfake-toolkit-bent-line 0.1.0" in (work / "runs" / "study" / "report.html").read_text()
    assert "wave/wave" in printed
    assert "def dx" in printed
