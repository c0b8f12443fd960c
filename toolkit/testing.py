"""The conformance kit: whether an activation is what its declaration says, for plugins' own tests and `toolkit plugins check`.

from toolkit.testing import check_activation

def test_my_activation():
    check_activation("my_act")
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toolkit.activations.assign import apply_rules
from toolkit.activations.declare import Activation
from toolkit.activations.module import ActivationModule
from toolkit.activations.registry import Registry, registered, registry
from toolkit.activations.spec import ActivationSpec
from toolkit.errors import UserError

State = Literal["passed", "failed", "not applicable"]
CHANNELS = 5
_ARROW = "at x = "


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check; ``message`` says what is wrong, with the input that shows it, or why it does not apply."""

    name: str
    state: State
    message: str = ""


class NonConforming(AssertionError):
    """At least one check failed; the message lists them."""


class _Failed(Exception):
    pass


class _NotApplicable(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is checked: a declaration, and where it is registered (empty if nowhere)."""

    activation: Activation
    provider: str

    @property
    def specs(self) -> list[ActivationSpec]:
        """The default choice, and every parameter learned per channel."""
        name = self.activation.name
        learnable = tuple(n for n, p in self.activation.parameters.items() if p.learnable)
        choices: list[ActivationSpec] = [ActivationSpec(name)]
        if learnable and self.activation.formula is not None:
            choices.append(ActivationSpec(name, None, (), learnable, True))
        return choices

    def module(self, spec: ActivationSpec) -> ActivationModule:
        kind = self.activation.implementation or ActivationModule
        return kind(self.activation, spec, provider=self.provider or "checked", channels=CHANNELS)

    def formula(self, x: Tensor, spec: ActivationSpec) -> Tensor:
        """The formula at the initial parameters, in the precision of x."""
        if self.activation.formula is None:
            raise _NotApplicable("it has no formula")
        values, _ = self.activation.configure(spec)
        return self.activation.formula(x, *self.activation.values_in_order(values))


def _points() -> Tensor:
    """Where functions are looked at, in float64: densely around zero, sparsely far out; zero itself is left to others."""
    near = torch.linspace(-6.03, 6.01, 301, dtype=torch.float64)
    far = torch.tensor([8.3, 15.7, 31.0, 87.0, 250.0, 1e4], dtype=torch.float64)
    return torch.cat([-far.flip(0), near, far])


def _images(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(3, CHANNELS, 4, 6, generator=generator)).to(dtype)


def _compare(x: Tensor, own: Tensor, right: Tensor, tolerance: float, what: str, than: str) -> None:
    """Raise with the input where ``own`` is furthest from ``right``, relative to the larger of 1 and its size."""
    own, right = own.detach().double().flatten(), right.detach().double().flatten()
    x = x.detach().double().flatten()
    seen = torch.isfinite(right) & (right.abs() < 3e38)
    error = (own - right).abs() / right.abs().clamp(min=1.0)
    error = torch.where(torch.isfinite(own), error, torch.full_like(error, math.inf))
    error = torch.where(seen, error, torch.zeros_like(error))
    place = int(error.argmax())
    if float(error[place]) > tolerance:
        raise _Failed(f"{_ARROW}{float(x[place]):.6g} {what} is {float(own[place]):.8g}, {than} {float(right[place]):.8g}")


def _gradient(y: Tensor, x: Tensor, keep: bool = False) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=keep, allow_unused=True)
    return torch.zeros_like(x) if g is None else g


# --- the checks, in the order in which they are reported -----------------------------------------------------------------


def _shapes(s: Subject) -> None:
    """shapes are kept"""
    sizes: list[tuple[int, ...]] = [(3, CHANNELS, 4, 6), (3, CHANNELS), (3, CHANNELS, 7), (2, CHANNELS, 3, 2, 2), (0, CHANNELS, 2, 2)]
    if s.activation.formula is not None:
        sizes += [(), (1,), (7,)]
    per_site = [dataclasses.replace(spec, per_channel=False) for spec in s.specs if spec.per_channel]
    for spec in [*s.specs, *per_site]:
        for shape in sizes:
            if spec.per_channel and len(shape) < 2:
                continue
            y = s.module(spec)(torch.ones(shape))
            if y.shape != shape:
                raise _Failed(f"an input of shape {list(shape)} gives {list(y.shape)} ({spec})")


def _dtypes(s: Subject) -> None:
    """dtypes are kept"""
    for spec in s.specs:
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            y = s.module(spec)(_images(dtype))
            if y.dtype != dtype:
                raise _Failed(f"an input of {dtype} gives {y.dtype} ({spec})")


def _memory_format(s: Subject) -> None:
    """memory formats are kept"""
    for spec in s.specs:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = _images().contiguous(memory_format=memory_format)
            y = s.module(spec)(x)
            if not y.is_contiguous(memory_format=memory_format):
                raise _Failed(f"an input in {memory_format} gives strides {y.stride()} for {x.stride()} ({spec})")


def _unmodified(s: Subject) -> None:
    """the input is not modified"""
    for spec in s.specs:
        x = _images()
        before = x.clone()
        s.module(spec)(x)
        if not torch.equal(x, before):
            place = int((x != before).flatten().nonzero()[0])
            raise _Failed(f"{_ARROW}{float(before.flatten()[place]):.6g}: the input itself became {float(x.flatten()[place]):.6g}")


def _deterministic(s: Subject) -> None:
    """the same input gives the same output, element by element"""
    for spec in s.specs:
        module = s.module(spec)
        x = _images()
        if not torch.equal(module(x), module(x)):
            raise _Failed("the same input gave two outputs")
        if s.activation.formula is not None:
            alone = torch.cat([module(x[:1]), module(x[1:])])
            _compare(x, alone, module(x), 1e-6, "the value in a part of the batch", "in the whole batch")


def _value(s: Subject) -> None:
    """the value is that of the formula in float64"""
    for spec in s.specs:
        if spec.per_channel:
            continue
        x = torch.cat([_points(), torch.zeros(1, dtype=torch.float64)]).float().double()
        right = s.formula(x, spec)
        _compare(x, s.module(spec)(x.float()), right, 2e-5, "the value", "the formula in float64 gives")


def _first_derivative(s: Subject) -> None:
    """the gradient is that of the formula, and of finite differences"""
    spec = s.specs[0]
    x = _points().float().double().requires_grad_()
    right = _gradient(s.formula(x, spec), x)
    # A step that grew with x would be a good part of a period of sin(x) far out.
    h = 1e-6
    with torch.no_grad():
        here = s.formula(x, spec)
        up, down = (s.formula(x + h, spec) - here) / h, (here - s.formula(x - h, spec)) / h
    smooth = (up - down).abs() < 1e-3 * (1 + up.abs())
    middle = torch.where(smooth, (up + down) / 2, torch.full_like(up, math.nan))
    _compare(x, right, middle, 1e-4, "the derivative", "finite differences give")
    own = x.detach().float().requires_grad_()
    _compare(x, _gradient(s.module(spec)(own), own), right, 5e-5, "the module's gradient", "that of the formula is")


def _second_derivative(s: Subject) -> None:
    """the second derivative is that of finite differences"""
    spec = s.specs[0]
    if s.activation.formula is None:
        raise _NotApplicable("it has no formula")
    if s.activation.properties(s.activation.configure(spec)[0]).smoothness < 2:
        raise _NotApplicable("its slope has a kink")

    def slope(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return _gradient(s.formula(x, spec), x).detach()

    x = _points().float().double().requires_grad_()
    first = _gradient(s.formula(x, spec), x, keep=True)
    right = _gradient(first, x)
    h = 1e-5
    _compare(x, right, (slope(x + h) - slope(x - h)) / (2 * h), 1e-3, "the second derivative", "finite differences give")
    own = x.detach().float().requires_grad_()
    twice = _gradient(_gradient(s.module(spec)(own), own, keep=True), own)
    _compare(x, twice, right, 2e-4, "the module's second derivative", "that of the formula is")


def _measured(s: Subject, name: str) -> tuple[Any, Any]:
    """What is declared, and what is measured when nothing is."""
    declared = getattr(s.activation, name)
    if declared is None:
        raise _NotApplicable("it is measured, not declared")
    if s.activation.formula is None:
        raise _NotApplicable("there is no formula to measure it from")
    nothing: dict[str, Any] = {name: None}
    plain = dataclasses.replace(s.activation, **nothing)
    return declared, getattr(plain.default_properties, name)


def _range(s: Subject) -> None:
    """the declared output range is true"""
    (low, high), measured = _measured(s, "output_range")
    x = _points()
    y = s.formula(x, s.specs[0])
    slack = 1e-9
    outside = (y < low - slack) | (y > high + slack)
    if outside.any():
        place = int(outside.nonzero()[0])
        raise _Failed(f"{_ARROW}{float(x[place]):.6g} the value {float(y[place]):.6g} is outside of {low:g} to {high:g}")
    for own, right in zip((low, high), measured, strict=True):
        if math.isinf(own) != math.isinf(right) or (math.isfinite(own) and abs(own - right) > 1e-2 * max(1.0, abs(right))):
            raise _Failed(f"declared {low:g} to {high:g}, the values span {measured[0]:.4g} to {measured[1]:.4g}")


def _smoothness(s: Subject) -> None:
    """the declared smoothness is true"""
    declared, measured = _measured(s, "smoothness")
    if declared != measured:
        raise _Failed(f"declared {declared}, measured {measured} (continuous derivatives)")


def _gain(s: Subject) -> None:
    """the declared gain is true"""
    declared, measured = _measured(s, "gain")
    if abs(declared - measured) > 0.02 * measured:
        raise _Failed(f"declared {declared:g}, measured {measured:.4g} (1 / root mean square output for normal input)")


def _monotonic(s: Subject) -> None:
    """the declared monotonicity is true"""
    declared, measured = _measured(s, "monotonic")
    if declared != measured:
        raise _Failed(f"declared {declared}, measured {measured}")


def _finite(s: Subject) -> None:
    """finite in float32 where it is in float64"""
    spec = s.specs[0]
    wide = torch.cat([_points(), torch.tensor([0.0, 1e-30, -1e-30, 100.0, -100.0, 1e6, -1e6], dtype=torch.float64)]).requires_grad_()
    right = s.formula(wide, spec)
    slope = _gradient(right, wide)
    x = wide.detach().float().requires_grad_()
    y = s.module(spec)(x)
    for what, own, reference in (("value", y, right), ("gradient", _gradient(y, x), slope)):
        bad = ~torch.isfinite(own.detach()) & torch.isfinite(reference.detach()) & (reference.detach().abs() < 1e38)
        if bad.any():
            place = int(bad.nonzero()[0])
            raise _Failed(
                f"{_ARROW}{float(wide[place]):.6g} the {what} is {float(own[place].detach())}, in float64 it is "
                f"{float(reference[place].detach()):.6g}"
            )


def _nan(s: Subject) -> None:
    """NaN is passed on"""
    for spec in s.specs:
        x = _images()
        x[1, 2, 3, 4] = math.nan
        y = s.module(spec)(x)
        if not torch.isnan(y[1, 2, 3, 4]):
            raise _Failed(f"at x = nan the value is {float(y[1, 2, 3, 4].detach()):.6g}: a diverged run would look healthy")


def _state_dict(s: Subject) -> None:
    """the state_dict makes a round trip"""
    for spec in s.specs:
        module, other = s.module(spec), s.module(spec)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.25)
        extra = set(module.state_dict()) - set(module.learned)
        if extra:
            raise _Failed(f"the state_dict holds {sorted(extra)[0]!r}, which is no learned parameter: other providers have no such key")
        other.load_state_dict(module.state_dict())
        if not torch.equal(module(_images()), other(_images())):
            raise _Failed(f"a module that loaded another's state computes something else ({spec})")


def _copies(s: Subject) -> None:
    """deepcopy makes an independent equal"""
    for spec in s.specs:
        module = s.module(spec)
        twin = copy.deepcopy(module)
        x = _images()
        if not torch.equal(module(x), twin(x)):
            raise _Failed(f"the copy computes something else ({spec})")
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(0.25)
        if any(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True)):
            raise _Failed(f"the copy shares its parameters ({spec})")


def _pickles(s: Subject) -> None:
    """pickle makes a round trip"""
    if not s.provider:
        raise _NotApplicable("it is not registered: a pickle names an activation by its plugin")
    for spec in s.specs:
        module = s.module(spec)
        try:
            twin = pickle.loads(pickle.dumps(module))
        except Exception as error:
            raise _Failed(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        if not torch.equal(module(_images()), twin(_images())):
            raise _Failed(f"the unpickled module computes something else ({spec})")


def _string_form(s: Subject) -> None:
    """the string form parses back"""
    given = [ActivationSpec(s.activation.name, None, ((n, c),)) for n, p in s.activation.parameters.items() for c in p.choices]
    numbers = tuple((n, p.default) for n, p in s.activation.parameters.items() if not p.choices)
    for spec in [*s.specs, *given, ActivationSpec(s.activation.name, None, numbers)]:
        module = s.module(spec)
        try:
            again = s.module(ActivationSpec.parse(str(module.spec)))
        except UserError as error:
            raise _Failed(f"{module.spec} cannot be read again: {error}") from error
        if again.values != module.values or again.learned != module.learned:
            raise _Failed(f"{module.spec} is read as {again.spec} with {again.values}")


def _parameter_gradients(s: Subject) -> None:
    """every learned parameter gets a gradient"""
    if not any(p.learnable for p in s.activation.parameters.values()):
        raise _NotApplicable("it has no parameter that can be learned")
    for spec in s.specs[1:]:
        module = s.module(spec)
        module(_images().requires_grad_()).square().sum().backward()
        for name, p in module.named_parameters():
            if p.grad is None:
                raise _Failed(f"{name} gets no gradient, with which DistributedDataParallel stops")
            if not p.grad.any():
                raise _Failed(f"the gradient of {name} is zero for any input: the formula does not depend on it")


def _compiles(s: Subject) -> None:
    """the same under torch.compile"""
    for spec in s.specs:
        torch._dynamo.reset()
        module = s.module(spec)
        x = _images()
        try:
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        except Exception as error:
            raise _Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        _compare(x, compiled, module(x), 1e-5, "the compiled value", "the eager one is")


def _autocast(s: Subject) -> None:
    """works under autocast"""
    for spec in s.specs:
        module = s.module(spec)
        x = _images().bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        expected = module(x.float())
        _compare(x, y, expected, 3e-2, "the value under autocast", "in float32 it is")


def _fresh_process(s: Subject) -> None:
    """the same in a fresh process"""
    if not s.provider:
        raise _NotApplicable("it is not registered, so another process does not know it")
    module = s.module(s.specs[-1])
    x = _images()
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"x": x, "state": module.state_dict()}, Path(folder, "in.pt"))
        code = (
            "import sys, torch\nfrom toolkit.testing import subject\nfrom toolkit.activations.spec import ActivationSpec\n"
            "folder, name, spec = sys.argv[1:]\ngiven = torch.load(folder + '/in.pt')\n"
            "m = subject(name).module(ActivationSpec.parse(spec))\nm.load_state_dict(given['state'])\n"
            "torch.save(m(given['x']).detach(), folder + '/out.pt')\n"
        )
        name = f"{s.provider}/{s.activation.name}"
        done = subprocess.run([sys.executable, "-c", code, folder, name, str(s.specs[-1])], capture_output=True, text=True, check=False)
        if done.returncode:
            raise _Failed((done.stderr.strip().splitlines() or ["the process failed"])[-1])
        other = torch.load(Path(folder, "out.pt"))
    _compare(x, other, module(x), 1e-6, "the value in a fresh process", "here it is")


def _providers(s: Subject) -> None:
    """providers of its name agree"""
    found = registry()
    name = s.activation.name
    others = {p: found.lookup(p, name) for p in found.providers if p != s.provider}
    agree = {p: a for p, a in others.items() if isinstance(a, Activation) and a.formula is not None}
    if not agree or s.activation.formula is None:
        raise _NotApplicable("nobody else has a formula under this name")
    x = _points().float().double()
    for provider, other in agree.items():
        if set(other.parameters) != set(s.activation.parameters):
            raise _Failed(f"{provider}/{name} has the parameters {list(other.parameters)}, this one {list(s.activation.parameters)}")
        _compare(x, s.formula(x, s.specs[0]), Subject(other, provider).formula(x, s.specs[0]), 1e-6, "the value", f"of {provider} it is")


def _backends(s: Subject) -> None:
    """versions of other backends are right"""
    found = registry()
    problems: list[str] = []
    checked = 0
    for backend in found.backends:
        if not s.provider:
            raise _NotApplicable("it is not registered, so backends do not see it")
        version = found.lookup(backend, s.activation.name)
        if isinstance(version, Activation) and version.formula is s.activation.formula and version.implementation is not None:
            for spec in s.specs:
                checked += 1
                problem = version.implementation.conformance(version, spec)
                problems += [f"{backend}, {spec}: {problem}"] if problem else []
    if not checked:
        raise _NotApplicable("no backend has a version of it")
    if problems:
        raise _Failed("; ".join(problems))


def _trains(s: Subject) -> None:
    """a few steps of a GAN stay finite"""
    from toolkit.gan.networks import Discriminator, Generator, initialise

    own = Registry(providers={**registry().providers, "checked": {s.activation.name: s.activation}})
    torch.manual_seed(0)
    g, d = Generator(16, 8, 4), Discriminator(16, 4)
    apply_rules(g, {"up*": f"checked/{s.activation.name}"}, example=g.example(), activations=own)
    apply_rules(d, {"down*": f"checked/{s.activation.name}"}, example=d.example(), activations=own)
    for network in (g, d):
        initialise(network)
    optimizers = [torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999)) for n in (g, d)]
    real = torch.rand(8, 3, 16, 16) * 2 - 1
    for step in range(4):
        for network, optimizer in ((d, optimizers[1]), (g, optimizers[0])):
            fake = g(torch.randn(8, 8))
            score = nn.functional.softplus(-d(fake)).mean()
            if network is d:
                score = nn.functional.softplus(-d(real)).mean() + nn.functional.softplus(d(fake.detach())).mean()
            optimizer.zero_grad()
            score.backward()
            bad = [n for n, p in network.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            if not score.isfinite() or bad:
                raise _Failed(
                    f"after {step} steps the loss is {float(score.detach()):g}"
                    + (f", the gradient of {bad[0]} is not finite" if bad else "")
                )
            optimizer.step()


CHECKS: tuple[Callable[[Subject], None], ...] = (
    _shapes, _dtypes, _memory_format, _unmodified, _deterministic, _value, _first_derivative, _second_derivative, _range, _smoothness,
    _gain, _monotonic, _finite, _nan, _state_dict, _copies, _pickles, _string_form, _parameter_gradients, _compiles, _autocast,
    _fresh_process, _providers, _backends, _trains,
)  # fmt: skip


def subject(activation: Activation | str) -> Subject:
    """What to check: a declaration, or the name of a registered one (``swish``, ``my_plugin/swish``).

    Raises:
        UserError: nobody provides that name.
    """
    if isinstance(activation, str):
        provider, found = registry().find(activation)
        return Subject(found, provider)
    return Subject(activation, registered(activation))


def run_checks(activation: Activation | str) -> Iterator[Check]:
    """Run every check, one after the other; none stops the others.

    Raises:
        UserError: nobody provides that name.
    """
    what = subject(activation)
    for check in CHECKS:
        name = (check.__doc__ or check.__name__).strip()
        try:
            with _quiet():
                check(what)
            yield Check(name, "passed")
        except _NotApplicable as reason:
            yield Check(name, "not applicable", str(reason))
        except _Failed as problem:
            yield Check(name, "failed", str(problem))
        except Exception as error:
            # Whatever an activation raises is its failure, not the kit's.
            yield Check(name, "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Random state and default dtype put back; the checks draw numbers of their own."""
    state = torch.get_rng_state()
    before = os.environ.copy()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        os.environ.clear()
        os.environ.update(before)


def check_activation(activation: Activation | str) -> list[Check]:
    """Check an activation against its declaration; for a plugin's own tests.

    Args:
        activation: the declaration, or the name of a registered one.

    Returns:
        The results, in the order of :data:`CHECKS`.

    Raises:
        NonConforming: a check failed; the message has one line for each that did.
        UserError: nobody provides that name.
    """
    results = list(run_checks(activation))
    failed = [f"{c.name}: {c.message}" for c in results if c.state == "failed"]
    if failed:
        name = activation if isinstance(activation, str) else activation.name
        raise NonConforming(f"{name} does not conform:\n" + "\n".join(failed))
    return results
