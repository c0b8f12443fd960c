"""Looking an activation up by name, alias and provider."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from toolkit.activations.declare import Activation
from toolkit.activations.spec import ActivationSpec
from toolkit.errors import UserError, closest
from toolkit.plugins import Plugins, plugins, wrong_list

DEFAULT_PROVIDER = "toolkit_builtin"


@dataclass
class Registry:
    """All activations of the loaded plugins.

    Attributes:
        providers: provider -> name -> declaration; aliases are entries of their own.
        unavailable: plugin that is blocked or broken -> why, in a line.
        backends: provider -> function that makes its version of another provider's declaration, when it is asked for.
    """

    providers: dict[str, dict[str, Activation]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    backends: dict[str, Callable[[Activation], Activation]] = field(default_factory=dict)
    _versions: dict[tuple[str, str], Activation | str] = field(default_factory=dict)

    @classmethod
    def from_plugins(cls, loaded: Plugins) -> Registry:
        """Collect what the plugins' ``toolkit_activations`` return; a wrong return marks that plugin broken."""
        result = cls()
        for plugin, activations in loaded.results("toolkit_activations"):
            if wrong := wrong_list("toolkit_activations", Activation, activations):
                loaded.mark_broken(plugin, wrong)
                continue
            names: dict[str, Activation] = {}
            for activation in activations:
                for name in (activation.name, *activation.aliases):
                    if name in names:
                        loaded.mark_broken(plugin, f"it declares the activation {name!r} twice")
                    names[name] = activation
            if loaded.infos[plugin].state == "loaded":
                result.providers[plugin] = names
                loaded.infos[plugin].provides["toolkit_activations"] = [a.name for a in activations]
        for plugin, make in loaded.results("toolkit_activation_backends"):
            if not callable(make):
                loaded.mark_broken(plugin, "toolkit_activation_backends() must return a function")
                continue
            result.backends[plugin] = make
            result.providers.setdefault(plugin, {})
            loaded.infos[plugin].provides["toolkit_activation_backends"] = ["every activation with a formula"]
        result.unavailable = {i.name: i.problem for i in loaded.infos.values() if i.state != "loaded"}
        return result

    def names(self) -> list[str]:
        """Every name that can be looked up, aliases included."""
        return sorted({name for names in self.providers.values() for name in names})

    def lookup(self, provider: str, name: str) -> Activation | str | None:
        """What ``provider`` has under ``name``: a declaration, why a backend has no version of it, or None."""
        found = self.providers.get(provider, {}).get(name)
        if found is not None or provider not in self.backends:
            return found
        for other in self._order():
            original = self.providers[other].get(name)
            if original is None:
                continue
            key = (provider, original.name)
            if key not in self._versions:
                try:
                    self._versions[key] = self.backends[provider](original)
                except UserError as error:
                    self._versions[key] = str(error)
            return self._versions[key]
        return None

    def origins(self, spec: ActivationSpec | str, prefer: Sequence[str] = ()) -> set[str]:
        """The plugins that what ``spec`` means comes from: the provider, and for a backend's version the declaration's too.

        Raises:
            UserError: as :meth:`find`.
        """
        provider, activation = self.find(spec, prefer)
        declared = next((p for p in self._order() if p not in self.backends and activation.name in self.providers[p]), provider)
        return {provider, declared} if provider in self.backends else {provider}

    def _order(self) -> list[str]:
        return [p for p in (DEFAULT_PROVIDER, *sorted(self.providers)) if p in self.providers]

    def find(self, spec: ActivationSpec | str, prefer: Sequence[str] = ()) -> tuple[str, Activation]:
        """The provider and declaration that ``spec`` means.

        A bare name is looked for in the providers of ``prefer``, then in the built-in ones, then in the others.

        Raises:
            UserError: nobody provides it, or ``prefer`` names an unknown provider.
        """
        spec = ActivationSpec.parse(spec)
        missing = "; ".join(self.unavailable.values())
        missing = f" ({missing})" if missing else ""
        for provider in [*prefer, *([spec.provider] if spec.provider else [])]:
            if provider not in self.providers:
                known = ", ".join(self.providers)
                advice = "" if missing else "; install it, or name its file with --plugin"
                raise UserError(f"no plugin {provider!r} provides activations; there are: {known}{advice}{missing}")
        for provider in [spec.provider] if spec.provider else [*prefer, *self._order()]:
            activation = self.lookup(provider, spec.name)
            if isinstance(activation, Activation):
                return provider, activation
            if activation is not None and spec.provider:
                raise UserError(f"{provider} has no version of {spec.name}: {activation}")
        names = sorted(self.providers[spec.provider]) if spec.provider and spec.provider not in self.backends else self.names()
        raise UserError(f"unknown activation {spec.name!r}; known: {', '.join(names)}.{closest(spec.name, names)}{missing}")


def registry() -> Registry:
    """The registry of this process's plugins."""
    return _registry_of(plugins())


@functools.lru_cache(maxsize=1)
def _registry_of(loaded: Plugins) -> Registry:
    return Registry.from_plugins(loaded)


def registered(activation: Activation) -> str:
    """The provider that ``activation`` is registered by, its name being looked up there; empty if it is not registered."""
    found = registry()
    return next((p for p in found.providers if found.lookup(p, activation.name) is activation), "")
