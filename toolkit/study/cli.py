"""``toolkit study``: run, status, report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.cli import Parser
from toolkit.errors import UserError, closest

if TYPE_CHECKING:
    from toolkit.study.spec import Study


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "toolkit study",
        description="A study trains a GAN for every activation of a grid and every seed, a detector for each GAN, measures "
        "quality and detectability, and reports what the choice did. configs/studies/ has some to start from.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        (
            "run",
            "run the cells that are not done, then write the report; the same command continues after an interruption",
        ),
        ("status", "what is done, running, failed and to do"),
        ("report", "write results.parquet and report.html from the cells that are done"),
    ):
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("spec", type=Path, help="the study's YAML file")
        sub.add_argument("--data", help="manifest to use instead of the file's")
        sub.add_argument("--out", type=Path, help="the study's folder (default: runs/studies/NAME)")
        if name == "run":
            sub.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
            sub.add_argument("--engine", default="local", help="what runs the cells: local, or a plugin's (default %(default)s)")
    return parser.parse_args(argv)


def open_study(spec: Path, data: str | None, out: Path | None) -> Study:
    """Load a spec and place the study in its folder."""
    from toolkit.study.spec import Study, StudySpec

    loaded = StudySpec.load(spec, data=data)
    return Study(loaded, out or Path("runs/studies") / loaded.name, source=str(spec))


def main(argv: list[str]) -> int:
    """Entry point of ``toolkit study``."""
    args = _arguments(argv)
    study = open_study(args.spec, args.data, args.out)
    if args.command == "status":
        return status(study)
    if args.command == "run":
        if args.workers < 1:
            raise UserError(f"--workers must be at least 1, not {args.workers}")
        return run(study, args.workers, args.engine)
    return report(study)


def run(study: Study, workers: int, engine: str = "local") -> int:
    """Run a study and write its report; the report is written even if some cells failed."""
    from toolkit.data.frames import load_frames
    from toolkit.plugins import plugins

    engines = plugins().mapping("toolkit_engines")
    if engine not in engines:
        raise UserError(f"unknown engine {engine!r}; known: {', '.join(engines)}.{closest(engine, engines)}")
    study.cells()
    # Once, here: the workers would all build the same cache.
    load_frames(study.manifest, study.spec.image_size)
    try:
        with carried_plugins(study.folder):
            engines[engine](study, workers)
    except UserError:
        if any(study.is_done(cell) for cell in study.cells()):
            report(study)
        raise
    return report(study)


@contextmanager
def carried_plugins(folder: Path) -> Iterator[None]:
    """Within the block new processes load copies of the plugin files, kept in the study's folder by their hash.

    So all cells of a run see the same code, wherever their workers are and whatever becomes of the files meanwhile.
    """
    from toolkit.files import atomic, file_hash
    from toolkit.plugins import FILES_VARIABLE, named_files

    copies = []
    for file in named_files():
        copies.append((folder / "plugins" / file_hash(file) / file.name).resolve())
        if not copies[-1].is_file():
            with atomic(copies[-1]) as temporary:
                temporary.write_bytes(file.read_bytes())
    before = os.environ.get(FILES_VARIABLE)
    if copies:
        os.environ[FILES_VARIABLE] = os.pathsep.join(map(str, copies))
    try:
        yield
    finally:
        if before is not None:
            os.environ[FILES_VARIABLE] = before


def report(study: Study) -> int:
    """Write the table and the report."""
    from toolkit.console import console
    from toolkit.study.report import write_report

    path = write_report(study)
    console.print(f"results: {study.folder / 'results.parquet'}")
    console.print(f"report:  {path.resolve()}")
    return 0


def status(study: Study) -> int:
    """Print the state of every cell."""
    from toolkit.console import print_rows
    from toolkit.files import read_json
    from toolkit.study.engine import has_failed, is_running

    rows, done = [], 0
    for cell in study.cells():
        state, remark = "to do", ""
        if study.is_done(cell):
            result = read_json(study.path(cell) / "result.json")
            state, remark = result["status"], result.get("message") or f"{result['seconds']:.0f} s"
            done += 1
        elif is_running(study, cell):
            state = "running"
        elif has_failed(study, cell):
            state, remark = "failed", read_json(study.path(cell) / "error.json")["error"]
        rows.append((cell.key, cell.title, state, remark))
    print_rows(f"{study.spec.name}: {done} of {len(rows)} cells done", ("cell", "what", "state", "remark"), rows)
    print(study.folder, file=sys.stderr)
    return 0
