"""What a plugin can provide: one documented hook each.

A plugin is a module with functions of these names, marked with :data:`toolkit.hookimpl` and announced by an entry point
in the group ``toolkit``. The name of the entry point is the plugin's name, and the *provider* of its activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from toolkit.activations.declare import Activation
    from toolkit.data.faces import FaceDetector
    from toolkit.data.layouts import Layout
    from toolkit.metrics.measure import Measure
    from toolkit.study.engine import Engine

hookspec = pluggy.HookspecMarker("toolkit")
hookimpl = pluggy.HookimplMarker("toolkit")


@hookspec
def toolkit_activations() -> list[Activation]:  # type: ignore[empty-body]
    """Activation functions, each declared by its formula.

    Example::

        @hookimpl
        def toolkit_activations():
            return [Activation("cube", lambda x, a: x + a * x**3, parameters={"a": Parameter(0.1)})]
    """


@hookspec
def toolkit_activation_backends() -> Callable[[Activation], Activation]:  # type: ignore[empty-body]
    """Another implementation of everyone's activations, found under this plugin's name.

    Returns a function from a declaration to the same declaration with ``implementation`` set, a subclass of
    :class:`toolkit.activations.module.ActivationModule`. It raises :class:`toolkit.errors.UserError` with the reason, in a
    few words, for an activation that it has no version of.

    Example::

        @hookimpl
        def toolkit_activation_backends():
            return lambda activation: dataclasses.replace(activation, implementation=MyModule)
    """


@hookspec
def toolkit_metrics() -> list[Measure]:  # type: ignore[empty-body]
    """Measures of synthetic clips; each appears in the results table and in the report of a study.

    Example::

        @hookimpl
        def toolkit_metrics():
            def brightness(real, fake):
                return abs(float(fake.frames.mean()) - float(real.frames.mean()))
            return [Measure("brightness gap", brightness, better="lower", unit="grey levels")]
    """


@hookspec
def toolkit_dataset_layouts() -> dict[str, Layout]:  # type: ignore[empty-body]
    """Dataset layouts: name -> function from the source folder to a :class:`toolkit.data.layouts.Listing`.

    Example::

        @hookimpl
        def toolkit_dataset_layouts():
            def flat(source):
                return Listing([VideoItem(p, video=p.stem, identity=p.stem) for p in sorted(source.glob("*.mp4"))])
            return {"flat": flat}
    """


@hookspec
def toolkit_face_detectors() -> dict[str, Callable[..., FaceDetector]]:  # type: ignore[empty-body]
    """Face detectors: name -> factory. The factory takes ``model: Path | None`` and returns a callable that maps an
    ``(H, W, 3)`` uint8 BGR frame to a list of :class:`toolkit.data.faces.Face`, best first.

    Example::

        @hookimpl
        def toolkit_face_detectors():
            return {"centre": lambda model=None: lambda frame: [Face(0, 0, frame.shape[1], frame.shape[0], 1.0)]}
    """


@hookspec
def toolkit_engines() -> dict[str, Engine]:  # type: ignore[empty-body]
    """Study engines: name -> function that runs the cells of a study.

    Example::

        @hookimpl
        def toolkit_engines():
            def one_by_one(study, workers):
                for cell in study.cells():
                    run_cell(study, cell)
            return {"one-by-one": one_by_one}
    """


@hookspec
def toolkit_commands() -> dict[str, tuple[Callable[[list[str]], Any], str]]:  # type: ignore[empty-body]
    """Sub-commands of ``toolkit``: name -> (function of the remaining arguments, one line of help).

    Example::

        @hookimpl
        def toolkit_commands():
            return {"hello": (lambda argv: print("hello", *argv), "greet the arguments")}
    """
