"""Running the cells of a study in worker processes on this machine.

There is no master that must survive: a worker claims a cell by locking a file in its folder, the lock goes with the
process however it ends, and a cell is done when its ``result.json`` is there. So any number of workers, started at any
time, share the work, and a study that was killed goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.errors import UserError
from toolkit.files import read_json, write_json
from toolkit.hookspecs import hookimpl
from toolkit.study.spec import Cell, Study

Engine = Callable[[Study, int], None]


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Try to lock ``folder`` for this process; yields whether that worked. The lock ends with the block or the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def is_running(study: Study, cell: Cell) -> bool:
    """Whether some process on this machine works on the cell now."""
    folder = study.path(cell)
    if not folder.is_dir() or study.is_done(cell):
        return False
    with claim(folder) as mine:
        return not mine


def has_failed(study: Study, cell: Cell) -> bool:
    """Whether the last attempt at the cell ended in an error."""
    return not study.is_done(cell) and (study.path(cell) / "error.json").is_file()


def work(study: Study, threads: int) -> None:
    """Run cells until none is left that this process could run. A cell that fails is left for the next ``study run``."""
    import torch

    torch.set_num_threads(threads)
    while True:
        runnable, waiting = [], False
        for cell in study.cells():
            if study.is_done(cell) or has_failed(study, cell):
                continue
            if all(study.is_done(key) for key in cell.needs):
                runnable.append(cell)
            else:
                waiting |= not any(has_failed(study, c) for c in study.cells() if c.key in cell.needs)
        ran = False
        for cell in runnable:
            with claim(study.path(cell)) as mine:
                if not mine or study.is_done(cell):
                    continue
                _attempt(study, cell)
                ran = True
                break
        if not ran:
            if not waiting and not runnable:
                return
            time.sleep(0.5)


def _attempt(study: Study, cell: Cell) -> None:
    from toolkit.study.cells import run_cell

    folder = study.path(cell)
    with (
        open(folder / "log.txt", "a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            run_cell(study, cell)
        except Exception as error:
            # One bad cell must not end a night's work; its reason is kept and reported.
            with contextlib.suppress(OSError):  # the disk may be full
                traceback.print_exc()
            try:
                write_json(folder / "error.json", {"error": f"{type(error).__name__}: {error}"})
            except OSError as full:
                # Nothing can be noted down, so nothing can be done: better to end than to try for ever.
                sys.exit(f"a worker ends: {full}")


def _worker(study: Study, threads: int, environment: dict[str, str]) -> None:
    # Of the command, which may name plugins: the server that workers are forked from has that of its own start.
    os.environ.update(environment)
    from toolkit.training import quiet

    quiet()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        work(study, threads)


def _end_with_parent() -> None:
    """Do not outlive the command that started the workers, however it ended: nobody would know of them."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def local(study: Study, workers: int) -> None:
    """The built-in engine: ``workers`` processes, a progress bar, and an error for every cell that failed.

    Raises:
        UserError: some cells failed; the others are done.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from toolkit.console import console

    cells = study.cells()
    for cell in cells:
        (study.path(cell) / "error.json").unlink(missing_ok=True)
    todo = [c for c in cells if not study.is_done(c)]
    if todo:
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, workers))
        # Forked from a clean process that has the imports behind it: half of a small study would be importing.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["toolkit.study.cells"])
        arguments = (study, threads, dict(os.environ))
        processes = [context.Process(target=_worker, args=arguments, daemon=False) for _ in range(min(workers, len(todo)))]
        for process in processes:
            process.start()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
                task = bar.add_task(study.spec.name, total=len(cells))
                while any(p.is_alive() for p in processes):
                    bar.update(task, completed=sum(study.is_done(c) for c in cells), description=_describe(study, todo))
                    time.sleep(0.5)
                bar.update(task, completed=sum(study.is_done(c) for c in cells), description=study.spec.name)
        except KeyboardInterrupt:
            for process in processes:
                process.terminate()
            raise
        finally:
            for process in processes:
                process.join()
        if died := [p.exitcode for p in processes if p.exitcode not in (0, None)]:
            print(
                f"warning: {len(died)} worker(s) ended with status {died[0]}; run the study again to continue",
                file=sys.stderr,
            )
    failed = [c for c in cells if has_failed(study, c)]
    if failed:
        first = read_json(study.path(failed[0]) / "error.json")["error"]
        raise UserError(
            f"{len(failed)} of {len(cells)} cells failed; {failed[0].title}: {first} (log: {study.path(failed[0]) / 'log.txt'}). "
            "Run the study again to try them once more"
        )


def _describe(study: Study, todo: list[Cell]) -> str:
    parts = []
    for cell in todo:
        if study.is_done(cell) or not is_running(study, cell):
            continue
        path = study.path(cell) / "progress.json"
        step = ""
        if path.is_file():
            with contextlib.suppress(UserError):
                told = read_json(path)
                step = f" {told['step']}/{told['steps']}"
        parts.append(cell.title + step)
    return "; ".join(parts) or study.spec.name


@hookimpl
def toolkit_engines() -> dict[str, Engine]:
    """``local``: worker processes on this machine."""
    return {"local": local}
