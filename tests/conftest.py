"""Shared fixtures. Tests that need real clips or a browser skip without them and say why."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from toolkit.data.manifest import Manifest
from toolkit.data.puppets import make_puppets

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A small embedded data set: 10 people, 32 px, clips of 12 consecutive frames."""
    return make_puppets(tmp_path_factory.mktemp("puppets"), identities=10, clips=2, frames=12, size=32)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real clips."""
    folder = Path(os.environ.get("TOOLKIT_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs real video: set TOOLKIT_REAL_DATA to a folder with faceforensics/, dfdc/, talking-heads/ and models/")
    return folder


@pytest.fixture(scope="session")
def yunet(real_data: Path) -> Path:
    """The YuNet model file."""
    path = real_data / "models" / "face_detection_yunet.onnx"
    if not path.is_file():
        pytest.skip("needs models/face_detection_yunet.onnx in the folder of real video")
    return path


@pytest.fixture(scope="session")
def chromium() -> str:
    """A headless Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    return path
