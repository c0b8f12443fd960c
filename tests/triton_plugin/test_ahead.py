"""Every kernel compiled for GPUs that are not there: registers, spills, and the width of loads and stores."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("Triton compiles nothing in its interpreter", allow_module_level=True)
pytest.importorskip("triton")

from toolkit.activations.registry import registry
from toolkit.activations.spec import ActivationSpec
from toolkit_triton import ahead
from toolkit_triton.module import scalars_of

NAMES = [n for n, a in registry().providers["toolkit_builtin"].items() if n == a.name and a.formula is not None]


def compile_function(job: tuple[str, str, str, str]) -> list[ahead.Compiled]:
    """All kernels of an activation, in a process of its own with a cache of its own."""
    target, text, dtype, folder = job
    os.environ |= {"TRITON_CACHE_DIR": f"{folder}/triton", "TOOLKIT_CACHE": f"{folder}/toolkit"}
    if text == "":
        return [ahead.compile_variant(v, target, dtype) for v in ahead.statistics_variants()]
    spec = ActivationSpec.parse(text)
    _, activation = registry().find(spec)
    scalars = scalars_of(activation, *activation.configure(spec))
    found = [ahead.compile_variant(v, target, dtype) for v in ahead.variants(scalars, per_channel=spec.per_channel)]
    return [ahead.Compiled(f"{text}: {c.name}", c.registers, c.spilled, c.assembly) for c in found]


def choices() -> list[str]:
    """Each built-in function with fixed parameters, and with all of them learned per channel."""
    result = []
    for name in NAMES:
        parameters = registry().providers["toolkit_builtin"][name].parameters
        learnable = [n for n, p in parameters.items() if p.learnable]
        result.append(f"{name}(learn=none)" if learnable else name)
        if learnable:
            result.append(f"{name}(learn=[{', '.join(learnable)}], per_channel=true)")
    return ["", *result, "gelu(approximate=tanh)"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("target", list(ahead.TARGETS))
def test_every_kernel_compiles_without_spills(target: str, tmp_path: Path) -> None:
    jobs = [(target, text, "bf16", str(tmp_path)) for text in choices()]
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        compiled = [c for found in pool.map(compile_function, jobs) for c in found]
    assert len(compiled) > 400
    assert not [f"{c.name}: {c.spilled}" for c in compiled if c.spilled]
    limit = 512 if target.startswith("gfx") else 255
    assert all(0 < c.registers <= limit for c in compiled)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_streaming_kernels_move_128_bits_at_a_time(dtype: str, tmp_path: Path) -> None:
    """In the PTX for sm_90, for channels_last and for NCHW: forward and backward of swish and relu, alone and fused."""
    for text in ("swish", "relu"):
        compiled = compile_function(("sm_90", text, dtype, str(tmp_path)))
        streaming = [c for c in compiled if "forward" in c.name or "plain" in c.name or "backward 2" in c.name]
        assert {c.name.split()[-1] for c in streaming} == {"channels_last", "nchw", "flat"}
        for c in streaming:
            # Narrower loads are of numbers per channel; every tensor is loaded and stored at full width.
            assert max(c.widths("ld")) == 128, c.name
            assert c.widths("st") & {8, 16, 64, 128} == {128}, c.name
            assert not c.widths("ld") & {8, 16}, c.name
