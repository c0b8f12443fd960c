"""Finding, loading, naming and blocking plugins. A broken plugin is reported, never fatal."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from toolkit import hookspecs
from toolkit.errors import UserError

GROUP = "toolkit"
BLOCK_VARIABLE = "TOOLKIT_BLOCK_PLUGINS"
FILES_VARIABLE = "TOOLKIT_PLUGIN_FILES"

# The toolkit's own layouts, detectors, measures and engines come through the same hooks as anyone else's, but their
# modules are imported only when the hook is asked for: `toolkit data prepare` has no need of PyTorch.
CORE = {
    "toolkit_dataset_layouts": "toolkit.data.layouts",
    "toolkit_face_detectors": "toolkit.data.faces",
    "toolkit_metrics": "toolkit.metrics.builtin",
    "toolkit_engines": "toolkit.study.engine",
}


@dataclass
class PluginInfo:
    """One plugin as ``toolkit plugins list`` shows it. ``state`` is ``loaded``, ``blocked`` or ``broken``."""

    name: str
    distribution: str
    version: str
    location: str = ""
    state: str = "loaded"
    reason: str = ""
    provides: dict[str, list[str]] = field(default_factory=dict)


class Plugins:
    """The plugins of this process: every entry point in the group ``toolkit`` and every named plugin file."""

    def __init__(self, files: list[Path] | None = None, block: set[str] | None = None) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self.infos: dict[str, PluginInfo] = {}
        block = block or set()
        for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
            dist = entry.dist
            info = PluginInfo(entry.name, dist.name if dist else "?", dist.version if dist else "?")
            if entry.name in self.infos:
                other = self.infos[entry.name]
                other.reason = f"another distribution, {info.distribution}, uses the same plugin name and was left out"
                continue
            self.infos[entry.name] = info
            self._load(info, entry.load, blocked=entry.name in block)
        for file in files or []:
            if not file.is_file():
                raise UserError(f"plugin file {file} is not there")
            info = PluginInfo(file.stem, "(file)", "-", str(file))
            if file.stem in self.infos:
                raise UserError(f"plugin file {file}: a plugin named {file.stem!r} is there already; rename the file")
            self.infos[file.stem] = info
            self._load(info, functools.partial(_import_file, file), blocked=file.stem in block)

    def _load(self, info: PluginInfo, load: Any, *, blocked: bool) -> None:
        if blocked:
            info.state, info.reason = "blocked", f"--block-plugin or {BLOCK_VARIABLE}"
            return
        try:
            module = load()
            info.location = getattr(module, "__file__", None) or info.location
            self._manager.register(module, info.name)
            self._check_hooks(module, info.name)
        except Exception as error:
            # Whatever a plugin does wrong while it loads must not harm the others.
            if self._manager.has_plugin(info.name):
                self._manager.unregister(name=info.name)
            info.state, info.reason = (
                "broken",
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            )

    def _check_hooks(self, module: Any, name: str) -> None:
        for hook in dir(module):
            if hook.startswith("toolkit_") and getattr(getattr(module, hook, None), "toolkit_impl", None) is not None:
                known = [n for n in dir(hookspecs) if n.startswith("toolkit_")]
                if hook not in known:
                    raise UserError(f"unknown hook {hook!r}; the hooks are {', '.join(known)}")

    def results(self, hook: str) -> Iterator[tuple[str, Any]]:
        """Call ``hook`` of every plugin; yield ``(plugin name, result)``. One that fails is marked broken and skipped."""
        core = CORE.get(hook)
        if core is not None:
            yield "toolkit", getattr(importlib.import_module(core), hook)()
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            info = self.infos[implementation.plugin_name]
            if info.state != "loaded":
                continue
            try:
                result = implementation.function()
            except Exception as error:
                self.mark_broken(info.name, f"{hook}() raised {type(error).__name__}: {error}")
                continue
            yield info.name, result

    def mapping(self, hook: str) -> dict[str, Any]:
        """Merge the dictionaries that the implementations of ``hook`` return; the first to claim a name keeps it."""
        merged: dict[str, Any] = {}
        owner: dict[str, str] = {}
        for plugin, result in self.results(hook):
            if not isinstance(result, dict):
                self.mark_broken(plugin, f"{hook}() must return a dict, not {type(result).__name__}")
                continue
            for name, value in result.items():
                if name in merged:
                    warnings.warn(f"{hook}: {name!r} of {plugin} is left out, {owner[name]} has that name", stacklevel=2)
                    continue
                merged[name], owner[name] = value, plugin
            if plugin in self.infos:
                self.infos[plugin].provides[hook] = list(result)
        return merged

    def mark_broken(self, name: str, reason: str) -> None:
        """Record that plugin ``name`` failed, with the reason; its other contributions are not asked for again."""
        if name not in self.infos:  # the toolkit's own part: a defect of ours, not a plugin's
            raise RuntimeError(f"{name}: {reason}")
        self.infos[name].state, self.infos[name].reason = "broken", reason.splitlines()[0]


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"toolkit_plugin_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def plugins() -> Plugins:
    """The plugins of this process, loaded at the first call.

    ``TOOLKIT_BLOCK_PLUGINS`` (comma-separated names) blocks some; ``TOOLKIT_PLUGIN_FILES`` (separated like ``PATH``)
    adds one-file plugins. The command-line options ``--block-plugin`` and ``--plugin`` set these variables, so worker
    processes see the same plugins as their parent.
    """
    block = {name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",") if name.strip()}
    files = [Path(f) for f in os.environ.get(FILES_VARIABLE, "").split(os.pathsep) if f]
    return Plugins(files, block)
