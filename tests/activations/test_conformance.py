"""The conformance kit finds planted faults: a zoo of broken activations, each caught by the check meant for it."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from toolkit import Activation, Parameter
from toolkit.activations.module import ActivationModule
from toolkit.cli import run
from toolkit.errors import UserError
from toolkit.testing import CHECKS, Check, NonConforming, check_activation, run_checks, subject


def only(activation: Activation | str, *words: str) -> list[Check]:
    """The results of the checks whose names contain any of ``words``, without running the others."""
    what = subject(activation)
    import toolkit.testing as kit

    chosen = tuple(c for c in CHECKS if any(w in (c.__doc__ or "") for w in words))
    assert chosen
    before = kit.CHECKS
    kit.CHECKS = chosen
    try:
        return list(run_checks(activation))
    finally:
        kit.CHECKS = before
        assert what.activation


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :1]


class Widens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().tanh()


class Reorders(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh().contiguous()


class Overwrites(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Shares(nn.Module):
    def __deepcopy__(self, memo: object) -> nn.Module:
        return nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if float(x.detach().sum()) > 0 else x * 1.0


class Fussy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("not under autocast")
        return x.tanh()


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos().detach()


def native(function):
    return lambda fixed, learned: None if learned else function


ZOO: dict[str, tuple[Activation, str, str]] = {
    "drops a dimension": (Activation("zoo", module=Cut), "shapes", r"\[3, 5, 4, 6\] gives \[3, 5, 4, 1\]"),
    "a fixed dtype": (Activation("zoo", module=Widens), "dtypes", "float64 gives torch.float32"),
    "loses channels_last": (Activation("zoo", module=Reorders), "memory formats", "channels_last gives strides"),
    "writes into its input": (Activation("zoo", module=Overwrites), "not modified", r"at x = -.* the input itself became 0"),
    "keeps a counter": (Activation("zoo", module=Remembers), "the same input", "two outputs"),
    "looks at the whole batch": (Activation("zoo", lambda x: x - x.mean()), "the same input", "at x = .* in a part of the batch"),
    "a native that is another function": (
        Activation("zoo", torch.tanh, native=native(torch.sigmoid)), "the value is", "at x = .* the formula in float64 gives"
    ),
    "a native with another gradient": (
        Activation("zoo", torch.sin, native=native(lambda x: x.sin() + (x * 0.1 - (x * 0.1).detach()))), "the gradient is that",
        "at x = .* the module's gradient is .* that of the formula",
    ),
    "a formula whose gradient is wrong": (
        Activation("zoo", lambda x: x.detach() * torch.sigmoid(x)), "the gradient is that", "at x = .* finite differences give"
    ),
    "a second derivative that is missing": (
        Activation("zoo", lambda x: Detached.apply(x)), "second derivative", "at x = .* the second derivative is 0, finite differences give"
    ),
    "too narrow a range": (
        Activation("zoo", lambda x: 2 * torch.tanh(x), output_range=(-1.0, 1.0)), "output range", "at x = .* outside of -1 to 1"
    ),
    "too wide a range": (Activation("zoo", torch.tanh, output_range=(-3.0, 3.0)), "output range", "the values span -1 to 1"),
    "not as smooth as it says": (Activation("zoo", torch.relu, smoothness=2), "smoothness", "declared 2, measured 0"),
    "another gain": (Activation("zoo", torch.relu, gain=3.0), "gain", r"declared 3, measured 1\.414"),
    "not monotonic": (Activation("zoo", torch.sin, monotonic=True), "monotonicity", "declared True, measured False"),
    "overflows on the way": (
        Activation("zoo", lambda x: torch.exp(x) / (1 + torch.exp(x))), "finite in float32", r"at x = .* is nan, in float64 it is 1"
    ),
    "hides a NaN": (Activation("zoo", lambda x: torch.where(x > 0, x, 0.0)), "NaN", "at x = nan the value is 0"),
    "holds a buffer": (Activation("zoo", module=Buffered), "state_dict", "'inner.scale', which is no learned parameter"),
    "copies to something else": (Activation("zoo", module=Shares), "deepcopy", "the copy computes something else"),
    "a parameter without effect": (
        Activation("zoo", lambda x, a: torch.tanh(x) + 0.0 * a, parameters={"a": Parameter(1.0)}), "learned parameter",
        "gradient of a is zero",
    ),
    "a parameter without a gradient": (
        Activation("zoo", lambda x, a: torch.tanh(x) * float(a if isinstance(a, float) else 1.0), parameters={"a": Parameter(1.0)}),
        "learned parameter", "a gets no gradient",
    ),
    "branches on its values": (Activation("zoo", module=Branches), "torch.compile", "Unsupported|graph break|[Dd]ata-dependent"),
    "a choice that cannot be written": (
        Activation("zoo", lambda x, kind: torch.tanh(x), parameters={"kind": Parameter("plain", choices=("plain", "tanh-like"))}),
        "string form", "tanh-like.* cannot be read again",
    ),
    "refuses autocast": (Activation("zoo", module=Fussy), "autocast", "not under autocast"),
    "diverges": (Activation("zoo", lambda x: torch.exp(x * x * 40)), "GAN", "after . steps the loss is|not finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ZOO)
def test_a_planted_fault_is_caught_by_its_check(fault: str) -> None:
    activation, check, words = ZOO[fault]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = only(activation, check)
    assert len(results) == 1
    assert results[0].state == "failed", results
    assert re.search(words, results[0].message), results[0].message


def test_the_zoo_has_something_for_every_check() -> None:
    elsewhere = ("fresh process", "providers of its name", "other backends", "pickle")  # these need a registered plugin: see below
    words = [check for _, check, _ in ZOO.values()] + list(elsewhere)
    assert not [c.__doc__ for c in CHECKS if not any(w in (c.__doc__ or "") for w in words)]


REGISTERED = """
import os, torch
from toolkit import Activation, Parameter, hookimpl

class Odd(float):
    pass

@hookimpl
def toolkit_activations():
    here = 1.0 if os.environ.get("ZOO_PARENT") == str(os.getpid()) else 2.0
    return [
        Activation("per_process", lambda x: here * torch.tanh(x)),
        Activation("relu", lambda x: torch.relu(x) + 0.25),
        Activation("bad_kernel", lambda x: torch.tanh(x), triton="def dx(x):\\n    return x * 0.0 + 0.5\\n"),
        Activation("unpicklable", lambda x: torch.tanh(x), native=lambda fixed, learned: None),
        Activation("right", lambda x, a: x * torch.sigmoid(a * x), parameters={"a": Parameter(1.0)}, output_range=None),
    ]
"""


@pytest.fixture
def zoo_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A one-file plugin, loaded in this process and its children."""
    from toolkit.plugins import plugins

    (tmp_path / "zoo_plugin.py").write_text(REGISTERED)
    monkeypatch.setenv("TOOLKIT_PLUGIN_FILES", str(tmp_path / "zoo_plugin.py"))
    monkeypatch.setenv("ZOO_PARENT", str(os.getpid()))
    plugins.cache_clear()
    yield
    monkeypatch.undo()
    plugins.cache_clear()


def test_faults_that_show_only_when_registered(zoo_plugin: None) -> None:
    (result,) = only("zoo_plugin/per_process", "fresh process")
    assert result.state == "failed"
    assert "the value in a fresh process" in result.message
    (result,) = only("zoo_plugin/relu", "providers of its name")
    assert result.state == "failed"
    assert "of toolkit_builtin it is" in result.message
    pytest.importorskip("triton")
    (result,) = only("zoo_plugin/bad_kernel", "other backends")
    assert result.state == "failed"
    assert "triton, bad_kernel: alone, the gradient by x" in result.message


def test_pickles_are_checked(zoo_plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivationModule, "__getstate__", lambda self: vars(self) | {"extra": lambda: None})
    (result,) = only("zoo_plugin/right", "pickle")
    assert result.state == "failed"


def test_a_sound_plugin_passes_everything(zoo_plugin: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "check", "zoo_plugin/right"]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    assert out.count("  ok  ") + out.count("  -   ") == len(CHECKS)


def test_a_failure_is_told_by_the_command_and_raised_in_tests(zoo_plugin: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "check", "zoo_plugin/relu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL providers of its name agree: at x =" in out
    assert "1 check failed" in out
    with pytest.raises(NonConforming, match="relu does not conform:\nproviders of its name agree"):
        check_activation("zoo_plugin/relu")
    with pytest.raises(UserError, match="unknown activation 'rightt'"):
        run(["plugins", "check", "rightt"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snake", "prelu", "gelu", "softmax"])
def test_built_in_activations_conform(name: str) -> None:
    results = check_activation(name)
    assert [c.name for c in results] == [(c.__doc__ or "").strip() for c in CHECKS]
