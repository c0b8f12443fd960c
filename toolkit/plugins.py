"""Finding, loading, naming and blocking plugins. A broken plugin is reported, never fatal."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from toolkit import hookspecs
from toolkit.errors import UserError, closest
from toolkit.files import file_hash

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


OWN = "deepfake-toolkit"


@dataclass
class PluginInfo:
    """One plugin as ``toolkit plugins list`` shows it. ``state`` is ``loaded``, ``blocked`` or ``broken``.

    ``contact`` says whom to ask about it. ``fingerprint`` is what results depend on: a file's hash, or a distribution's version.
    """

    name: str
    distribution: str
    version: str
    location: str = ""
    state: str = "loaded"
    reason: str = ""
    contact: str = ""
    fingerprint: str = ""
    provides: dict[str, list[str]] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """What is wrong and whom to ask, in a line."""
        return f"plugin {self.name} is {self.state}: {self.reason}" + (f"; {self.contact}" if self.state == "broken" else "")


class Plugins:
    """The plugins of this process: every entry point in the group ``toolkit`` and every named plugin file.

    Attributes:
        infos: name -> :class:`PluginInfo`, of the blocked and broken ones too.
        notices: what else a person should know, such as names that two plugins claim.
    """

    announce = True  # problems are told on standard error as they turn up

    def __init__(self, files: Iterable[Path] = (), block: Iterable[str] = ()) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self.infos: dict[str, PluginInfo] = {}
        self.notices: list[str] = []
        block = set(block)
        for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
            dist = entry.dist
            info = PluginInfo(entry.name, dist.name if dist else "?", dist.version if dist else "?", entry.value, contact=_contact(dist))
            info.fingerprint = f"{info.distribution} {info.version}"
            self._add(info, entry.load, entry.name in block)
        for file in files:
            if not file.is_file():
                raise UserError(f"plugin file {file} is not there")
            info = PluginInfo(file.stem, "(file)", "-", str(file), contact=f"mend {file}", fingerprint=file_hash(file))
            self._add(info, functools.partial(_import_file, file), file.stem in block)
        for name in sorted(block - set(self.infos)):
            self._notice(f"there is no plugin {name!r} to block.{closest(name, self.infos)}")

    def _add(self, info: PluginInfo, load: Any, blocked: bool) -> None:
        if info.name in self.infos:
            other = self.infos[info.name]
            taken = f"the name {info.name!r} is that of another plugin, of {other.distribution} ({other.location})"
            what = "rename the file" if info.distribution == "(file)" else f"block or uninstall one; {info.contact}"
            info.contact = what
            info.name = f"{info.name} ({info.location if info.distribution == '(file)' else info.distribution})"
            self.infos[info.name] = info
            self.mark_broken(info.name, taken)
            return
        self.infos[info.name] = info
        if blocked:
            info.state, info.reason = "blocked", f"--block-plugin or {BLOCK_VARIABLE}"
            return
        try:
            module = load()
            info.location = getattr(module, "__file__", None) or info.location
            _check_hooks(module)
            self._manager.register(module, info.name)
        except (Exception, SystemExit) as error:
            # Whatever a plugin does wrong while it loads must not harm the others.
            if self._manager.has_plugin(info.name):
                self._manager.unregister(name=info.name)
            self.mark_broken(info.name, _told(error))

    def _notice(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)
            if self.announce:
                print(f"warning: {text}", file=sys.stderr)

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
            except (Exception, SystemExit) as error:
                self.mark_broken(info.name, f"{hook}() failed: {_told(error)}")
                continue
            yield info.name, result

    def mapping(self, hook: str) -> dict[str, Any]:
        """Merge the dictionaries that the implementations of ``hook`` return.

        The first to claim a name keeps it; what another has under that name is found as ``plugin/name``.
        """
        merged: dict[str, Any] = {}
        owner: dict[str, str] = {}
        for plugin, result in self.results(hook):
            if not isinstance(result, dict) or not all(isinstance(name, str) for name in result):
                self.mark_broken(plugin, f"{hook}() must return a dict with names as keys, not {_kind(result)}")
                continue
            names = []
            for name, value in result.items():
                names.append(self.own_name(plugin, name, owner))
                merged[names[-1]] = value
            if plugin in self.infos:
                self.infos[plugin].provides[hook] = names
        return merged

    def own_name(self, plugin: str, name: str, owner: dict[str, str]) -> str:
        """The name that ``plugin`` gets to use: ``name``, or ``plugin/name`` where ``owner`` says that another has it."""
        if owner.setdefault(name, plugin) == plugin:
            return name
        contact = self.infos[plugin].contact
        self._notice(
            f"{name!r} is {owner[name]}'s; that of the plugin {plugin} is found as {plugin}/{name}" + (f" ({contact})" if contact else "")
        )
        return f"{plugin}/{name}"

    def mark_broken(self, name: str, reason: str) -> None:
        """Record that plugin ``name`` failed, with the reason; its other contributions are not asked for again."""
        if name not in self.infos:  # the toolkit's own part: a defect of ours, not a plugin's
            raise RuntimeError(f"{name}: {reason}")
        info = self.infos[name]
        info.state, info.reason = "broken", (reason.splitlines() or [""])[0]
        if self.announce:
            print(f"warning: {info.problem}", file=sys.stderr)

    def fingerprints(self, names: Iterable[str]) -> dict[str, str]:
        """Of those among the plugins ``names`` that are not the toolkit's own: name -> fingerprint."""
        infos = [self.infos[n] for n in sorted(set(names)) if n in self.infos]
        return {i.name: i.fingerprint for i in infos if i.distribution != OWN}


def _told(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]


def wrong_list(hook: str, wanted: type, value: Any) -> str:
    """What is wrong with the result of ``hook``, which has to be a list of ``wanted``; empty if nothing is."""
    if not isinstance(value, list):
        return f"{hook}() must return a list of {wanted.__name__}, not {_kind(value)}"
    wrong = [v for v in value if not isinstance(v, wanted)]
    return f"{hook}() must return a list of {wanted.__name__}, which {_kind(wrong[0])} is not" if wrong else ""


def _check_hooks(module: Any) -> None:
    """Raise :class:`UserError` for a hook of an unknown name, one with arguments, or none at all."""
    known = [n for n in dir(hookspecs) if n.startswith("toolkit_")]
    attributes = {n: getattr(module, n, None) for n in dir(module)}
    found = {n: f for n, f in attributes.items() if getattr(f, "toolkit_impl", None) is not None and callable(f)}
    for name, function in found.items():
        if name not in known:
            raise UserError(f"unknown hook {name!r}; the hooks are {', '.join(known)}.{closest(name, known)}")
        if needed := [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]:
            raise UserError(f"{name}() is called without arguments, and must not ask for {', '.join(needed)}")
    if not found:
        forgotten = [n for n in known if callable(getattr(module, n, None))]
        raise UserError(
            f"{forgotten[0]}() is not marked with @hookimpl" if forgotten else f"it has no hook; the hooks are {', '.join(known)}"
        )


def _contact(dist: importlib.metadata.Distribution | None) -> str:
    """Whom to ask about a distribution, from its metadata."""
    if dist is None:
        return ""
    metadata = dist.metadata
    people = next((metadata[k] for k in ("Maintainer-email", "Author-email", "Maintainer", "Author") if k in metadata), "")
    urls = {u.partition(",")[0].strip().lower(): u.partition(",")[2].strip() for u in metadata.get_all("Project-URL") or []}
    place = next(
        (urls[k] for k in ("issues", "bug tracker", "repository", "source", "homepage") if k in urls),
        (metadata.get_all("Home-page") or [""])[0],
    )
    return "ask " + " or at ".join(x for x in (people or f"the author of {dist.name}", place) if x)


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
    return Plugins(named_files(), block)


def named_files() -> list[Path]:
    """The plugin files that ``--plugin`` and configs have named so far."""
    return [Path(f) for f in os.environ.get(FILES_VARIABLE, "").split(os.pathsep) if f]


def use_files(files: Iterable[str | Path], folder: Path) -> list[Path]:
    """Load one-file plugins that a config names, in this process and in those it starts.

    Args:
        files: paths, from ``folder`` where they are not absolute.
        folder: of the config.

    Returns:
        Their absolute paths.

    Raises:
        UserError: one is not there, or two of one name differ.
    """
    found = [Path(os.path.abspath(folder / Path(f).expanduser())) for f in files]
    for file in found:
        if not file.is_file():
            raise UserError(f"plugin file {file} is not there")
    already = named_files()
    same = {(f.stem, file_hash(f)) for f in already if f.is_file()}
    # A worker has the copy that its study carries; the original need not be loaded beside it.
    new = [f for f in dict.fromkeys(found) if f not in already and (f.stem, file_hash(f)) not in same]
    if new:
        os.environ[FILES_VARIABLE] = os.pathsep.join(map(str, [*already, *new]))
        plugins.cache_clear()
    return found


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """Problems of plugins are not told on standard error within the block: whoever asks lists them all."""
    before = Plugins.announce
    Plugins.announce = False
    try:
        yield
    finally:
        Plugins.announce = before
