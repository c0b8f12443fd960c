"""Sites of a network, and rules that give each site its own activation.

A *site* is one place where a network applies a nonlinearity as a module. Rules are shell-style globs over the sites'
dotted names; they apply in order and the last match wins.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toolkit.activations.fuse import fuse, unfuse
from toolkit.activations.module import ActivationModule
from toolkit.activations.registry import Registry, registry
from toolkit.activations.spec import ActivationSpec
from toolkit.errors import UserError, closest

log = logging.getLogger(__name__)

Rules = Mapping[str, str | Mapping[str, Any]]

_NOT_ACTIVATIONS = {"MultiheadAttention"}
_FUNCTIONS = {
    "relu",
    "relu_",
    "relu6",
    "leaky_relu",
    "leaky_relu_",
    "prelu",
    "rrelu",
    "elu",
    "elu_",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "sigmoid",
    "sigmoid_",
    "tanh",
    "tanh_",
    "softmax",
    "log_softmax",
    "softplus",
    "softsign",
    "logsigmoid",
    "glu",
    "scaled_dot_product_attention",
    "clamp_min",
    "clamp_min_",
    "threshold",
}


class Site(nn.Module):
    """A place for an activation in a network that has not been given its rules yet.

    Args:
        default: the activation (string form) that the site gets when no rule matches it.
    """

    def __init__(self, default: str) -> None:
        super().__init__()
        self.default = default

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this network's sites have no activations yet: call toolkit.apply_rules on it")


@dataclass
class SiteInfo:
    """What is known of one site.

    Attributes:
        name: dotted name of the module in its network.
        shape: shape of the input in the traced forward pass; None if the pass did not reach the site.
        channel_dim: the dimension that holds the channels: -1 after a linear layer, 1 otherwise.
        calls: how often one forward pass goes through it.
        activation: string form of what it now holds (the class name for a module that is not ours).
        provider: where that comes from; ``(model)`` for a timm module left as it was.
        fused: what the activation is fused with, ``-`` for nothing.
    """

    name: str
    shape: tuple[int, ...] | None = None
    channel_dim: int = 1
    calls: int = 0
    activation: str = ""
    provider: str = "(model)"
    parameters: str = ""
    fused: str = "-"


@dataclass
class Sites:
    """The sites of a network in order, and the nonlinearities that it calls as functions, which no rule can reach."""

    sites: dict[str, SiteInfo] = field(default_factory=dict)
    functional: dict[str, int] = field(default_factory=dict)


def is_site(module: nn.Module) -> bool:
    """Whether ``module`` is a nonlinearity: ours, or one of the classes of ``torch.nn`` and timm."""
    if isinstance(module, Site | ActivationModule):
        return True
    kind = type(module)
    if kind.__name__ in _NOT_ACTIVATIONS or isinstance(module, nn.Identity):
        return False
    return kind.__module__ == "torch.nn.modules.activation" or kind.__module__.startswith("timm.layers.activations")


def site_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> module of every site; a module that hangs in two places counts as two sites."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if name and is_site(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


class _FunctionSpy(TorchFunctionMode):
    """Counts nonlinear functions that run outside of sites, by the module that called them."""

    def __init__(self, stack: list[tuple[str, bool]]) -> None:
        super().__init__()
        self.stack, self.counts = stack, {}  # type: ignore[var-annotated]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _FUNCTIONS and not any(inside for _, inside in self.stack):
            where = self.stack[-1][0] if self.stack else ""
            key = f"{where or '(network)'}: {name}"
            self.counts[key] = self.counts.get(key, 0) + 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _quiet_state(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, training flags and random state put back afterwards."""
    flags = {name: module.training for name, module in network.named_modules()}
    state = torch.get_rng_state()
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_rng_state(state)
        for name, module in network.named_modules():
            module.training = flags.get(name, network.training)


def find_sites(network: nn.Module, example: Tensor | Sequence[Tensor] | None = None) -> Sites:
    """List the sites of ``network``; with an ``example`` input one forward pass finds shapes and functional calls.

    Args:
        network: any module; its sites may be our own or modules of ``torch.nn`` and timm.
        example: the input (or inputs) of one forward pass, run in evaluation mode and without gradients.
    """
    modules = site_modules(network)
    result = Sites({name: SiteInfo(name, **_describe(module)) for name, module in modules.items()})
    if example is None:
        return result
    stack: list[tuple[str, bool]] = []
    made_by: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # keeps outputs alive, so that an id is not used twice
    handles = []

    def enter(name: str, inside: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            stack.append((name, inside))
            if inside and args and isinstance(args[0], Tensor):
                info = result.sites[name]
                info.calls += 1
                info.shape = tuple(args[0].shape)
                maker = made_by.get(id(args[0]))
                info.channel_dim = -1 if isinstance(maker, nn.Linear) or args[0].dim() == 3 else 1

        return hook

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack.pop()
        if isinstance(output, Tensor) and not isinstance(module, nn.Dropout | nn.Identity):
            made_by[id(output)] = module
            kept.append(output)

    try:
        for name, module in network.named_modules():
            if any(name.startswith(f"{site}.") for site in modules):
                continue
            handles.append(module.register_forward_pre_hook(enter(name, name in modules)))
            handles.append(module.register_forward_hook(leave))
        with _quiet_state(network), _FunctionSpy(stack) as spy, _bypass_empty_sites(modules):
            network(*example) if isinstance(example, list | tuple) else network(example)
    finally:
        for handle in handles:
            handle.remove()
    result.functional = spy.counts
    return result


@contextmanager
def _bypass_empty_sites(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let sites without rules pass their input through, so that a network can be traced before its rules are applied."""
    empty = [m for m in modules.values() if isinstance(m, Site)]
    for module in empty:
        object.__setattr__(module, "forward", lambda x: x)
    try:
        yield
    finally:
        for module in empty:
            del module.forward


def _describe(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, ActivationModule):
        learned = [f"{n} learned{' per channel' if module.spec.per_channel else ''}" for n in module.learned]
        fixed = [f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in module.values.items() if n not in module.learned]
        text = str(module.spec).removeprefix(f"{module.spec.provider}/")
        parameters = ", ".join(learned + fixed)
        return {"activation": text, "provider": module.provider, "parameters": parameters, "fused": module.fused_with}
    if isinstance(module, Site):
        return {"activation": module.default, "provider": "(default)"}
    return {"activation": type(module).__name__}


def match_rules(names: Sequence[str], rules: Rules, defaults: Mapping[str, str] | None = None) -> dict[str, ActivationSpec]:
    """Which activation each site gets: the defaults, then the rules in order, the last match wins.

    Raises:
        UserError: a pattern matches no site, or a value is not an activation.
    """
    chosen = {name: ActivationSpec.parse(text) for name, text in (defaults or {}).items()}
    for pattern, value in rules.items():
        spec = ActivationSpec.parse(value)
        matched = [name for name in names if fnmatch.fnmatchcase(name, str(pattern))]
        if not matched:
            shown = ", ".join(names[:40]) + (f", ... ({len(names)} in all)" if len(names) > 40 else "")
            raise UserError(f"the pattern {pattern!r} matches no site; the sites are: {shown}.{closest(str(pattern), names)}")
        chosen.update(dict.fromkeys(matched, spec))
    return chosen


def apply_rules(
    network: nn.Module,
    rules: Rules,
    *,
    example: Tensor | Sequence[Tensor] | None = None,
    prefer: Sequence[str] = (),
    activations: Registry | None = None,
) -> dict[str, str]:
    """Give every site of ``network`` that a rule (or a site's default) names its own fresh activation, in place.

    Args:
        network: the network to change.
        rules: pattern -> activation, in order.
        example: input of one forward pass; needed for per-channel parameters.
        prefer: providers to take a bare name from, before the built-in ones.
        activations: the registry to look names up in; the process's own by default.

    Returns:
        Site name -> ``provider/activation(...)`` of every site that was set, in the network's order.

    Raises:
        UserError: a pattern matches no site, an activation or a parameter is unknown, or a provider is.
    """
    activations = activations or registry()
    unfuse(network)
    modules = site_modules(network)
    defaults = {name: module.default for name, module in modules.items() if isinstance(module, Site)}
    chosen = match_rules(list(modules), rules, defaults)
    if not chosen:
        return {}
    resolved = {name: activations.find(spec, prefer) for name, spec in chosen.items()}
    traced = find_sites(network, example).sites if example is not None else {}
    result: dict[str, str] = {}
    for name in modules:
        if name not in chosen:
            continue
        provider, activation = resolved[name]
        info = traced.get(name)
        channel_dim = info.channel_dim if info else 1
        channels = info.shape[channel_dim] if info and info.shape and len(info.shape) > 1 else None
        try:
            kind = activation.implementation or ActivationModule
            module = kind(activation, chosen[name], provider=provider, channels=channels, channel_dim=channel_dim)
        except UserError as error:
            raise UserError(f"site {name}: {error}") from error
        module.train(modules[name].training)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module)
        result[name] = f"{provider}/{str(module.spec).removeprefix(f'{module.spec.provider}/')}"
    sites = site_modules(network)
    if example is not None and any(isinstance(m, ActivationModule) and m.fusible for m in sites.values()):
        with _quiet_state(network), _bypass_empty_sites(sites):
            fused = fuse(network, lambda: network(*example) if isinstance(example, list | tuple) else network(example), sites)
        for name, text in fused.items():
            log.debug("site %s: fused with %s", name, text)
    if callable(done := getattr(network, "on_activations_set", None)):
        done()
    for name, text in result.items():
        log.debug("site %s: %s", name, text)
    return result
