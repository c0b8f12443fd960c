"""Looking an activation up by name, alias and provider."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from toolkit.activations.declare import Activation
from toolkit.activations.spec import ActivationSpec
from toolkit.errors import UserError, closest
from toolkit.plugins import Plugins, plugins

DEFAULT_PROVIDER = "toolkit_builtin"


@dataclass
class Registry:
    """All activations of the loaded plugins: provider -> name -> declaration. Aliases are entries of their own."""

    providers: dict[str, dict[str, Activation]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_plugins(cls, loaded: Plugins) -> Registry:
        """Collect what the plugins' ``toolkit_activations`` return; a wrong return marks that plugin broken."""
        result = cls()
        for plugin, activations in loaded.results("toolkit_activations"):
            if not isinstance(activations, list) or not all(isinstance(a, Activation) for a in activations):
                loaded.mark_broken(plugin, "toolkit_activations() must return a list of Activation")
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
        result.unavailable = {i.name: f"{i.state}: {i.reason}" for i in loaded.infos.values() if i.state != "loaded"}
        return result

    def names(self) -> list[str]:
        """Every name that can be looked up, aliases included."""
        return sorted({name for names in self.providers.values() for name in names})

    def find(self, spec: ActivationSpec | str, prefer: Sequence[str] = ()) -> tuple[str, Activation]:
        """The provider and declaration that ``spec`` means.

        A bare name is looked for in the providers of ``prefer``, then in the built-in ones, then in the others.

        Raises:
            UserError: nobody provides it, or ``prefer`` names an unknown provider.
        """
        spec = ActivationSpec.parse(spec)
        missing = "; ".join(f"plugin {name} is {why}" for name, why in self.unavailable.items())
        missing = f" ({missing})" if missing else ""
        for provider in [*prefer, *([spec.provider] if spec.provider else [])]:
            if provider not in self.providers:
                known = ", ".join(self.providers)
                raise UserError(f"no plugin {provider!r} provides activations; there are: {known}{missing}")
        order = [spec.provider] if spec.provider else [*prefer, DEFAULT_PROVIDER, *sorted(self.providers)]
        for provider in order:
            activation = self.providers.get(provider, {}).get(spec.name)
            if activation is not None:
                return provider, activation
        names = sorted(self.providers[spec.provider]) if spec.provider else self.names()
        raise UserError(f"unknown activation {spec.name!r}; known: {', '.join(names)}.{closest(spec.name, names)}{missing}")


@functools.cache
def registry() -> Registry:
    """The registry of this process's plugins."""
    return Registry.from_plugins(plugins())
