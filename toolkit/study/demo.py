"""``toolkit demo``: the main job, small, on the embedded data."""

from __future__ import annotations

import os
import time
from importlib import resources
from pathlib import Path

from toolkit.cli import Parser


def main(argv: list[str]) -> int:
    """Entry point of ``toolkit demo``."""
    parser = Parser(
        "toolkit demo",
        description="Trains small GANs with three activations on the embedded puppets, and detectors for their fakes; measures both; "
        "ends with the path of a report. About five minutes on two CPU cores. The same command continues after an interruption.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the demo's folder (default %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    args = parser.parse_args(argv)

    from toolkit.console import console
    from toolkit.data.puppets import make_puppets
    from toolkit.study.cli import run
    from toolkit.study.spec import Study, StudySpec

    started = time.monotonic()
    console.print("The demo renders puppets, trains 6 GANs (3 activations x 2 seeds) and 8 detectors, and writes a report.")
    data = args.out / "puppets"
    make_puppets(data, identities=30, clips=2, frames=32, size=32)
    with resources.as_file(resources.files("toolkit.study").joinpath("demo.yaml")) as path:
        spec = StudySpec.load(path, data=str(data))
    status = run(Study(spec, args.out, source="demo"), args.workers)
    console.print(f"That took {(time.monotonic() - started) / 60:.1f} minutes. Open the report in a browser.")
    return status
