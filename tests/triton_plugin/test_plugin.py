"""The Triton plugin as its users meet it: without a GPU, in configs and commands; and its kernels, in the interpreter."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from toolkit.activations.assign import apply_rules, find_sites
from toolkit.activations.registry import registry
from toolkit.cli import run
from toolkit.errors import UserError
from toolkit.gan.module import GAN
from toolkit.parallel import synchronise_batch_norm

HERE = Path(__file__).parent
SHARDS = ("test_every and fp32", "test_every and not fp32", "not test_every")


COMMAND = ("-c", "import sys; from toolkit.cli import main; sys.exit(main())")


def python(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own; one thread each, so that several do not wait for each other."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


@pytest.fixture(scope="module")
def shards() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The tests of the kernels in Triton's interpreter, all parts at once."""
    pytest.importorskip("triton")
    arguments = ("-m", "pytest", "--no-header", "-p", "no:cacheprovider", str(HERE / "test_kernels.py"), "-k")
    started = {part: python(*arguments, part, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="") for part in SHARDS}
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("part", SHARDS)
def test_kernels_in_the_interpreter(part: str, shards: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = shards[part].communicate()
    assert shards[part].returncode == 0, output[-6000:]
    assert "passed" in output


def test_without_a_gpu_the_formula_runs_and_that_is_said_once() -> None:
    code = """
from toolkit.gan.module import GAN
from toolkit.parallel import synchronise_batch_norm
import torch
for _ in range(2):
    gan = GAN(16, generator_width=4, discriminator_width=4, prefer=["triton"])
    plain = GAN(16, generator_width=4, discriminator_width=4)
    plain.load_state_dict(gan.state_dict())
    z = torch.randn(4, 100)
    assert torch.equal(gan.generator(z), plain.generator(z))
"""
    process = python("-c", code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert output.count("run as plain PyTorch formulas: there is no GPU") == 1


def test_without_triton_the_formula_runs_and_that_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
    )
    code = """
import torch
from toolkit.activations.assign import apply_rules
n = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
print(apply_rules(n, {"2": "swish"}, example=torch.zeros(2, 3, 8, 8), prefer=["triton"]))
print(n(torch.randn(2, 3, 8, 8)).shape)
"""
    process = python("-c", code, PYTHONPATH=str(tmp_path), TRITON_INTERPRET="1")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "triton/swish" in output
    assert output.count("run as plain PyTorch formulas: Triton is not installed") == 1


def test_layers_shows_what_was_fused_with_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "gan.yaml"
    config.write_text("model: {image_size: 32, generator_width: 4, discriminator_width: 4, upsampling: nearest, prefer: [triton]}\n")
    assert run(["layers", str(config)]) == 0
    out = capsys.readouterr().out
    for words in ("norm up1.norm", "norm down2.norm", "bias rgb", "triton"):
        assert words in out
    config.write_text("model: {backbone: resnet18, image_size: 32, prefer: [triton], activations: {backbone: {'*': swish}}}\n")
    assert run(["layers", str(config)]) == 0
    out = capsys.readouterr().out
    assert "norm layer1.0.bn2 + residual" in out
    assert "norm bn1" in out


def test_show_prints_the_generated_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "show", "swish(beta=1.5, learn=beta)", "--triton"]) == 0
    source = capsys.readouterr().out
    compile(source, "generated", "exec")
    assert "def d_beta(x, P):" in source
    assert run(["plugins", "show", "swish"]) == 0
    out = capsys.readouterr().out
    assert "toolkit_builtin, triton" in out
    assert "torch.sigmoid(beta * x)" in out
    with pytest.raises(UserError, match="triton has no version of softmax: it is not element-wise"):
        run(["plugins", "show", "softmax", "--triton"])


def test_list_says_what_has_no_triton_version_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "list"]) == 0
    assert "triton has no version of toolkit_builtin/softmax: it is not element-wise" in capsys.readouterr().out


def test_preference_takes_triton_where_it_exists() -> None:
    assert registry().find("swish", ["triton"])[0] == "triton"
    assert registry().find("silu", ["triton"])[0] == "triton"
    assert registry().find("softmax", ["triton"])[0] == "toolkit_builtin"
    assert registry().find("swish")[0] == "toolkit_builtin"
    assert registry().find("triton/swish")[0] == "triton"
    with pytest.raises(UserError, match="triton has no version of softmax"):
        registry().find("triton/softmax")
    with pytest.raises(UserError, match=r"unknown activation 'swosh'.*swish"):
        registry().find("triton/swosh")


def test_a_third_party_activation_has_a_triton_version(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import torch\nfrom toolkit import Activation, Parameter, hookimpl\n\n@hookimpl\ndef toolkit_activations():\n"
        "    return [Activation('bent', lambda x, a: x + a * (torch.sqrt(x * x + 1) - 1), parameters={'a': Parameter(0.5)}),\n"
        "            Activation('odd', lambda x: x - x.mean())]\n"
    )
    output, _ = python(*COMMAND, "--plugin", str(plugin), "plugins", "show", "bent(learn=a)", "--triton").communicate()
    assert "def d_a(x, P):" in output
    output, _ = python(*COMMAND, "--plugin", str(plugin), "plugins", "list").communicate()
    assert "triton has no version of mine/odd: it uses mean, which has no scalar Triton form" in " ".join(output.split())


def test_copies_have_fused_operations_of_their_own() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    keys = list(network.state_dict())
    apply_rules(network, {"2": "swish"}, example=torch.zeros(2, 3, 8, 8), prefer=["triton"])
    assert list(network.state_dict()) == keys
    twin = copy.deepcopy(network)
    assert vars(twin[1])["forward"].module is twin[1]
    assert vars(twin[1])["forward"].act is twin[2]
    assert find_sites(twin, torch.zeros(2, 3, 8, 8)).sites["2"].fused == "norm 1"


def test_synchronised_norms_are_fused_as_the_plain_ones_were() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    apply_rules(network, {"2": "swish"}, example=torch.zeros(2, 3, 8, 8), prefer=["triton"])
    converted = synchronise_batch_norm(network, torch.device("cuda"))
    assert type(converted[1]) is nn.SyncBatchNorm
    assert vars(converted[1])["forward"].module is converted[1]
    assert vars(converted[1])["forward"].act is converted[2]
    efficient = timm.create_model("test_efficientnet", num_classes=0)
    site = next(n for n, s in find_sites(efficient).sites.items() if n.endswith("bn1.act"))
    apply_rules(efficient, {site: "swish"}, example=torch.zeros(2, 3, 32, 32), prefer=["triton"])
    converted = synchronise_batch_norm(efficient, torch.device("cuda"))
    norm = converted.get_submodule(site.removesuffix(".act"))
    assert isinstance(norm, nn.SyncBatchNorm)
    assert vars(norm)["forward"].module is norm
    converted.eval()
    assert converted(torch.zeros(2, 3, 32, 32)).isfinite().all()


def test_checkpoints_move_between_providers(tmp_path: Path) -> None:
    rules = {"generator": {"*": "swish(learn=beta, per_channel=true)", "output": "tanh"}}
    own = GAN(16, generator_width=4, discriminator_width=4, activations=rules, prefer=["triton"])
    plain = GAN(16, generator_width=4, discriminator_width=4, activations=rules)
    assert own.sites["generator"]["up1.act"].startswith("triton/swish")
    plain.load_state_dict(pickle.loads(pickle.dumps(own.state_dict())))
    own.load_state_dict(plain.state_dict())


def test_benchmarks_run_every_way_of_computing_an_operation(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    arguments = [*COMMAND, "bench", "fused", "--activations", "swish", "--sizes", "2x4x3x3", "--dtypes", "fp32",
                 "--providers", "eager", "in place", "triton", "--out", str(tmp_path / "out")]  # fmt: skip
    process = python(*arguments, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", TOOLKIT_CACHE=str(tmp_path))
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    assert "times mean nothing" in output
    import pandas as pd

    frame = pd.read_csv(tmp_path / "out" / "results.csv")
    found = set(zip(frame.kernel_name, frame.kernel_provider, frame.kernel_operation_mode, strict=True))
    for operation in ("bias_act", "add_act"):
        assert {(f"{operation} swish", "triton", mode) for mode in ("forward", "backward", "full", "second")} <= found
    assert ("norm_add_act swish", "triton", "backward") in found
    assert "<html>" in (tmp_path / "out" / "plot.html").read_text()[:2000]


def test_benchmarks_refuse_what_they_do_not_know() -> None:
    for arguments, words in ((["--sizes", "3MBx"], "size '3MBx'"), (["--modes", "forwards"], "forward"), (["--dtypes", "fp8"], "fp8")):
        with pytest.raises(UserError, match=words):
            run(["bench", "activations", *arguments])


@pytest.mark.slow
def test_whole_steps_of_every_way_run() -> None:
    """The benchmark of whole steps, tiny and on the CPU: every way computes, without a CUDA graph."""
    from toolkit.bench.gpu_step import dcgan_steps, resnet_steps
    from toolkit.bench.timing import alternate

    device, ways = torch.device("cpu"), ("eager", "compiled", "triton")
    plain = ("eager", "triton")
    for steps, expected in (
        (dcgan_steps(16, 4, 4, "fp32", "swish", device, ways), ways),
        (resnet_steps(2, "bf16", "relu", device, plain, image_size=32), plain),
    ):
        timings = alternate([s.variant() for s in steps], 4, 1, 0.01)
        assert tuple(t.name for t in timings) == expected
        assert all(t.median > 0 for t in timings)
