"""Fusing an activation with its neighbour: the batch norm, convolution bias or residual sum that its input comes from.

One traced forward pass finds the pairs. The neighbour then no longer computes its part but hands on a :class:`Deferred`,
which the activation computes in one go. Whoever else touches a deferred value gets the ordinary one: a network whose
forward pass takes another turn than the traced one is slower, never wrong. Modules, their names and the ``state_dict``
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from toolkit.activations.deferred import SUMS, SUMS_IN_PLACE, Deferred
from toolkit.activations.module import ActivationModule


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


class _Defer:
    """The ``forward`` of a module whose part is put off for an activation; an object, so that it is copied with the network."""

    def __init__(self, module: nn.Module, act: ActivationModule) -> None:
        self.module, self.act = module, act

    def _fused(self, x: Any) -> bool:
        # A hook wants to see what the module computes, a probe of the activation its real input: then all is as usual.
        return self.act.can_fuse(x) and not _has_hooks(self.act) and not _has_hooks(self.module)


class DeferNorm(_Defer):
    """For a batch norm: hands on its input."""

    def __call__(self, x: Tensor) -> Any:
        return Deferred(x, self.module) if self._fused(x) else type(self.module).forward(self.module, x)


class DeferBias(_Defer):
    """For a convolution: hands on its output without the bias."""

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        module = self.module
        if rest or not self._fused(x):
            return type(module).forward(module, x, *rest)
        weight = module.weight
        assert isinstance(weight, Tensor)
        if isinstance(module, nn.ConvTranspose2d):
            sizes: tuple[Any, ...] = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
            y = nn.functional.conv_transpose2d(x, weight, None, *sizes)
        else:
            assert isinstance(module, nn.Conv2d)
            y = module._conv_forward(x, weight, None)
        return Deferred(y, module)


class DeferSum(_Defer):
    """For the module that computes the first term of a sum before the activation: hands on its output, to be added to."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = type(self.module).forward(self.module, *args, **kwargs)
        return Deferred(y, None) if type(y) is Tensor and self._fused(y) else y


class FuseNormAct(_Defer):
    """For timm's batch norm that holds its activation (``BatchNormAct2d``): both in one operation."""

    def __call__(self, x: Tensor) -> Any:
        return self.act.norm_act(x, self.module) if self._fused(x) else type(self.module).forward(self.module, x)


@dataclass
class _Node:
    """One tensor of the traced pass: who made it, and who read it."""

    maker: str = ""
    terms: tuple[_Node, _Node] | None = None
    in_place: bool = False
    readers: list[object] = field(default_factory=list)


class _Trace(TorchFunctionMode):
    """Records which tensor each function makes from which; functions inside of sites and norms are theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[int, _Node] = {}
        self.kept: list[Tensor] = []  # an id stays taken as long as its tensor lives
        self.inside = 0

    def node(self, tensor: Tensor) -> _Node:
        if id(tensor) not in self.nodes:
            self.kept.append(tensor)
            self.nodes[id(tensor)] = _Node()
        return self.nodes[id(tensor)]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        read = [self.node(t) for t in _tensors((args, kwargs))]
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        if not made:
            return result
        call = object()
        for node in read:
            node.readers.append(call)
        for tensor in made:
            if any(tensor is t for t in _tensors((args, kwargs))):  # in place: the same tensor is another value from here on
                self.nodes[id(tensor)] = _Node()
        if name in SUMS and len(args) == 2 and not kwargs and all(isinstance(a, Tensor) for a in args) and args[0].shape == args[1].shape:
            node = self.node(made[0])
            node.terms, node.in_place = (read[0], read[1]), name in SUMS_IN_PLACE
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_norm(module: nn.Module) -> bool:
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _is_conv_with_bias(module: nn.Module) -> bool:
    # Classes that compute their forward in another way are left alone; a parametrised weight changes nothing here.
    same = getattr(type(module), "forward", None) in (nn.Conv2d.forward, nn.ConvTranspose2d.forward)
    return same and getattr(module, "bias", None) is not None and getattr(module, "padding_mode", "") == "zeros"


def _is_norm_with_activation(module: nn.Module) -> bool:
    return (
        type(module).__name__ == "BatchNormAct2d"
        and type(module).__module__.startswith("timm.layers")
        and isinstance(module.act, ActivationModule)
        and isinstance(module.drop, nn.Identity)
    )


@contextmanager
def _hooked(network: nn.Module, trace: _Trace, inputs: dict[str, list[_Node]], opaque: Mapping[str, nn.Module]) -> Iterator[None]:
    handles = []

    def enter(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name in opaque and not trace.inside:
                for node in map(trace.node, _tensors(args)):
                    node.readers.append(name)
                    inputs.setdefault(name, []).append(node)
            if name in opaque:
                trace.inside += 1

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name in opaque:
                trace.inside -= 1
            if isinstance(output, Tensor) and not trace.inside:
                node = trace.node(output)
                # Inner modules leave first: the innermost that made a tensor is its maker.
                if not node.maker and not any(output is t for t in _tensors(args)):
                    node.maker = name

        return hook

    try:
        for name, module in network.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name, module)))
            handles.append(module.register_forward_hook(leave(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def unfuse(network: nn.Module) -> None:
    """Undo :func:`fuse`, in place."""
    for module in network.modules():
        if isinstance(vars(module).get("forward"), _Defer):
            del module.forward
        if isinstance(module, ActivationModule):
            module.fused_with = "-"


@contextmanager
def fused_again(network: nn.Module) -> Iterator[None]:
    """Around a change of norms to others of the same names (to synchronised ones): these are fused as the old ones were."""
    fused = {name: vars(module)["forward"] for name, module in network.named_modules() if isinstance(vars(module).get("forward"), _Defer)}
    yield
    for name, module in network.named_modules():
        if name in fused and "forward" not in vars(module):
            module.forward = type(fused[name])(module, fused[name].act)


def fuse(network: nn.Module, run: Callable[[], Any], sites: Mapping[str, nn.Module]) -> dict[str, str]:
    """Fuse activations of ``network`` that offer it with what comes before them, in place.

    Args:
        network: with its activations set.
        run: one forward pass, without gradients and in evaluation mode.
        sites: its sites.

    Returns:
        Site -> what it is fused with, as ``toolkit layers`` shows it.
    """
    modules = dict(network.named_modules())
    acts = {name: m for name, m in sites.items() if isinstance(m, ActivationModule) and m.fusible}
    joint = {name: m for name, m in modules.items() if _is_norm_with_activation(m) and f"{name}.act" in acts}
    opaque = {n: m for n, m in modules.items() if n in sites or n in joint or isinstance(m, _BatchNorm) or _is_conv_with_bias(m)}
    trace = _Trace()
    inputs: dict[str, list[_Node]] = {}
    with _hooked(network, trace, inputs, opaque), trace:
        result = run()
    for tensor in _tensors(result):
        trace.node(tensor).readers.append("(result)")

    fused: dict[str, str] = {}
    for name, module in joint.items():
        act = acts[f"{name}.act"]
        module.forward = FuseNormAct(module, act)
        act.fused_with = fused[f"{name}.act"] = f"norm {name}"
    for name, act in acts.items():
        if name in fused or len(inputs.get(name, ())) != 1:
            continue
        node = inputs[name][0]
        if node.readers != [name]:
            continue
        found = _partner(node, modules, inputs)
        if found is None:
            continue
        kind, maker, words = found
        modules[maker].forward = kind(modules[maker], act)
        act.fused_with = fused[name] = words
    return fused


def _partner(node: _Node, modules: Mapping[str, nn.Module], inputs: Mapping[str, list[_Node]]) -> tuple[type[_Defer], str, str] | None:
    """What the activation of ``node`` can be fused with: how, the module whose work is put off, and a description."""

    def free(maker: str) -> bool:
        module = modules.get(maker)
        # Called once, not put off for another, and with a forward of its class.
        return module is not None and "forward" not in vars(module) and len(inputs.get(maker, ())) <= 1

    if node.terms is None:
        if not free(node.maker):
            return None
        if _is_norm(modules[node.maker]):
            return DeferNorm, node.maker, f"norm {node.maker}"
        if _is_conv_with_bias(modules[node.maker]):
            return DeferBias, node.maker, f"bias {node.maker}"
        return None
    # In place only the first term can be the one put off; each must be read by the sum alone.
    candidates = node.terms[:1] if node.in_place else node.terms
    terms = tuple(t for t in candidates if len(t.readers) == 1 and t.terms is None and t.maker and free(t.maker))
    for term in terms:
        if _is_norm(modules[term.maker]):
            return DeferNorm, term.maker, f"norm {term.maker} + residual"
    for term in terms:
        if not _is_conv_with_bias(modules[term.maker]) and not isinstance(modules[term.maker], ActivationModule):
            return DeferSum, term.maker, "residual"
    return None
