"""The ``toolkit`` command: a table of sub-commands, each imported only when it is called."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from toolkit.errors import UserError, closest

COMMANDS = {
    "demo": ("toolkit.study.demo", "the main job on the embedded data; ends with a report"),
    "data": ("toolkit.data.cli", "prepare: face crops and a manifest from videos; puppets: the embedded data; audit: shortcuts"),
    "gan": ("toolkit.gan.cli", "fit, test: train and measure a DCGAN; sample: render clips from a checkpoint"),
    "detector": ("toolkit.detector.cli", "fit, test: train and measure a frame-level fake detector; robustness: spoiled frames"),
    "detect": ("toolkit.detector.detect", "score video files with a trained detector"),
    "study": ("toolkit.study.cli", "run, status, report: a grid of activations x seeds, and its report"),
    "plugins": (
        "toolkit.activations.cli",
        "list: what is installed and where from; show, check: one activation; new: a plugin of your own",
    ),
    "layers": ("toolkit.activations.cli", "the sites of a network and the activation at each"),
    "bench": ("toolkit.bench.cli", "activations, fused, step, detect: speed and memory against eager PyTorch and torch.compile"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts no abbreviations and answers a mistake with one line and exit status 2."""

    def __init__(self, prog: str | None = None, **keywords: Any) -> None:
        keywords.setdefault("allow_abbrev", False)
        super().__init__(prog, **keywords)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see `{self.prog} --help`)")


def _overview() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [
        "usage: toolkit COMMAND ... [--plugin FILE] [--block-plugin NAME]",
        "",
        "GAN training and deepfake detection with pluggable activation functions, chosen per layer.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "options of every command:",
        "  --plugin FILE        load a one-file plugin (may be repeated)",
        "  --block-plugin NAME  do not load this plugin (may be repeated)",
        "  --version            print the version",
        "",
        "`toolkit COMMAND --help` explains a command. Plugins can add commands: `toolkit plugins list`.",
        "Start with `toolkit demo`.",
    ]
    return "\n".join(lines)


def _global_options(argv: list[str]) -> list[str]:
    """Take these options, wherever they stand, and put them into the environment, for worker processes too."""
    from toolkit.plugins import BLOCK_VARIABLE, FILES_VARIABLE

    given, rest = list(argv), []
    while given:
        option, equals, value = given.pop(0).partition("=")
        if option not in ("--plugin", "--block-plugin"):
            rest.append(option + equals + value)
            continue
        if not value:
            if not given:
                raise UserError(f"{option} needs a value")
            value = given.pop(0)
        variable, joint = (FILES_VARIABLE, os.pathsep) if option == "--plugin" else (BLOCK_VARIABLE, ",")
        value = os.path.abspath(value) if option == "--plugin" else value
        before = os.environ.get(variable, "")
        os.environ[variable] = f"{before}{joint}{value}" if before else value
    return rest


def _has_foreign_plugins() -> bool:
    """Whether a plugin other than our own is installed, told from metadata alone: imports nothing."""
    from toolkit.plugins import FILES_VARIABLE, GROUP

    own = ("toolkit_builtin", "toolkit_triton")
    return bool(os.environ.get(FILES_VARIABLE)) or any(
        e.module.split(".")[0] not in own for e in importlib.metadata.entry_points(group=GROUP)
    )


def _find(command: str) -> Callable[[list[str]], Any]:
    if command in COMMANDS:
        module = importlib.import_module(COMMANDS[command][0])
        return getattr(module, f"main_{command}", None) or module.main
    offered: dict[str, Any] = {}
    if _has_foreign_plugins():
        from toolkit.plugins import plugins

        offered = plugins().mapping("toolkit_commands")
        if command in offered:
            return offered[command][0]
    known = [*COMMANDS, *offered]
    raise UserError(f"unknown command {command!r}; the commands are {', '.join(known)}.{closest(command, known)}")


def run(argv: Sequence[str]) -> int:
    """Run ``toolkit`` with these arguments; returns the exit status, lets :class:`UserError` through."""
    arguments = _global_options(list(argv))
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        import toolkit

        print(f"deepfake-toolkit {toolkit.__version__}")
        return 0
    return int(_find(arguments[0])(arguments[1:]) or 0)


def _told(error: OSError) -> str:
    """One line on a file that cannot be read or written, and what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; make room, then run the same command again: it continues from what was written"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}; choose another folder, or change its permissions"
    return f"{' '.join(str(error).split())[:300]}; if the disk is full, make room and run the same command again"


def main() -> NoReturn:
    """Entry point of the console script. Exit status 2 means a mistake that the user can mend."""
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"toolkit: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("toolkit: interrupted; run the same command again to continue", file=sys.stderr)
        status = 130
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output is gone (`| head`); nothing is left to tell it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        print(f"toolkit: error: {_told(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)
