"""Compiling every kernel of an activation ahead of time, for GPUs that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from toolkit_triton import kernels, launch
from toolkit_triton.formula import Scalars

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_FLOAT32 = {"mean_ptr", "var_ptr", "w_ptr", "b_ptr", "p_ptr", "sums_ptr", "count_ptr", "out_ptr", "ub_ptr", "up_ptr"}
_FLOAT32 |= {"running_mean_ptr", "running_var_ptr"}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target: its registers per thread, the bytes it spills to memory, and its assembly."""

    name: str
    registers: int
    spilled: int
    assembly: str

    def widths(self, access: str) -> set[int]:
        """Widths in bits of the global loads (``ld``) or stores (``st``) of a CUDA kernel."""
        found = re.findall(rf"{access}\.global(?:\.L\w+::\w+|\.\w+::\w+)*(?:\.(v\d))?\.([bfu])(\d+)", self.assembly)
        return {int(vector[1:] or 1) * int(bits) if vector else int(bits) for vector, _, bits in found}


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time arguments; run-time arguments of value 1 are constants, as in Triton's own launch."""

    name: str
    kernel: Any
    constants: dict[str, Any]


def variants(scalars: Scalars, *, per_channel: bool = False) -> Iterator[Variant]:
    """Every kernel that an activation can launch: plain, with a bias, a residual, a norm; forward, backward, twice; by layout.

    Sizes are those of a large layer: 128 channels last, or maps of 64 x 64; ``flat`` where channels do not matter.
    """
    f = launch.functions(scalars)
    count = len(scalars.learned)
    parameters = {"NP": count, "PER_CHANNEL": per_channel and count > 0}
    from_output = scalars.needs == "output"
    slope = {"input": "input", "output": "saved", "none": "none"}[scalars.needs]
    tiles = {
        "channels_last": {"LAST": True, "R": 16, "K": 128, "S": 1},
        "nchw": {"LAST": False, "R": 1, "K": 2048},
        "flat": {"LAST": False, "R": 1, "K": 2048, "N": 1, "C": 1, "blocks": 1},
    }
    forms = {
        "plain": {"NORM": False, "AFFINE": False, "RESIDUAL": False},
        "bias": {"NORM": False, "AFFINE": True, "RESIDUAL": False},
        "add": {"NORM": False, "AFFINE": False, "RESIDUAL": True},
        "norm": {"NORM": True, "AFFINE": True, "RESIDUAL": False},
        "norm_add": {"NORM": True, "AFFINE": True, "RESIDUAL": True},
    }
    summing = {
        "channels_last": {"R": launch.SUM_TILE // 128, "TILES": 4},
        "nchw": {"K": launch.SUM_TILE, "TILES": 4},
        "flat": {"K": launch.SUM_TILE if count else launch.STREAM_TILE, "TILES": 4 if count else 1},
    }
    halved = {"channels_last": {"R": launch.SUM_TILE // 256}, "nchw": {"K": launch.SUM_TILE // 2}}
    halved |= {"flat": {"K": launch.SUM_TILE // 2}} if count else {}
    for layout, tile in tiles.items():
        for form, flags in forms.items():
            if (layout == "flat") != (form in ("plain", "add") and not parameters["PER_CHANNEL"]):
                continue
            where = f"{form} {layout}"
            keep = form == "add" and slope == "input"
            yield Variant(f"forward {where}", kernels.forward_kernel, {"VALUE": f.value, **parameters, **flags, "KEEP": keep, **tile})
            if form == "add":  # backward is that of the plain form
                continue
            norm = bool(flags["NORM"])
            saved = slope if not norm else "saved" if flags["RESIDUAL"] and from_output else "input"
            backward = {
                "DX": f.dx_y if saved == "saved" else f.dx, "BY": f.by_parameters, **parameters, **flags, "SLOPE_FROM": saved,
                "AFFINE": (flags["AFFINE"] and saved != "saved") or norm, "RESIDUAL": flags["RESIDUAL"] and saved == "input",
                "WRITE_G": not norm or flags["RESIDUAL"], "WRITE_DX": False, "SUM_G": form != "plain", "SUM_P": count > 0,
            }  # fmt: skip
            yield Variant(f"backward {where}", kernels.backward_kernel, {**backward, **tile, **summing[layout]})
            if norm:
                have = {"HAVE_G": flags["RESIDUAL"], "AFFINE": True, "COUNTED": False}
                yield Variant(f"backward 2 {where}", kernels.norm_dx_kernel, {"DX": f.dx, **parameters, **have, **tile, **summing[layout]})
            elif not scalars.twice:
                yield Variant(
                    f"second {where}",
                    kernels.second_kernel,
                    {
                        "SECOND_DY": f.second_dy_y if from_output else f.second_dy,
                        "SECOND_DX": f.second_dx_y if from_output else f.second_dx,
                        "SECOND_P": f.second_parameters, **parameters, "BIAS": form == "bias" and not from_output, "U": True,
                        "U_BIAS": form == "bias", "SUM_S": form == "bias" and not from_output, "SUM_P": count > 0,
                        **tile, **summing[layout], **halved.get(layout, {}),
                    },
                )  # fmt: skip


def statistics_variants() -> Iterator[Variant]:
    """The kernels that batch norm needs whatever the activation."""
    for layout, tile in (("channels_last", {"LAST": True, "R": 8, "K": 128, "S": 1}), ("nchw", {"LAST": False, "R": 1, "K": 1024})):
        yield Variant(f"statistics {layout}", kernels.statistics_kernel, {**tile, "TILES": 4})
    for cumulative in (False, True):
        yield Variant(f"join {cumulative}", kernels.join_kernel, {"RUNNING": True, "CUMULATIVE": cumulative, "ROWS": 64, "K": 32})


def compile_variant(variant: Variant, target: str, dtype: str = "bf16") -> Compiled:
    """Compile one kernel.

    Args:
        target: one of ``TARGETS``.
        dtype: of the tensors: ``fp32``, ``fp16`` or ``bf16``.
    """
    names = variant.kernel.arg_names
    constants = {n: variant.constants[n] for n in names if n in variant.constants}
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in _FLOAT32 else "*i64" if name == "batches_ptr" else f"*{dtype}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in ("eps", "momentum", "count"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name in ("N", "C", "S"):
                attributes[(place,)] = [["tt.divisibility", 16]]
    warps = launch.SUM_WARPS if variant.constants.get("SUM_P") or variant.constants.get("SUM_S") else launch.WARPS
    source = triton.compiler.ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=TARGETS[target], options={"num_warps": warps, **launch.OPTIONS})
    if target.startswith("sm_"):
        registers, spilled = _cuda_resources(built.asm["cubin"])
        return Compiled(variant.name, registers, spilled, built.asm["ptx"])
    text = built.asm["amdgcn"]
    spilled = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", text))
    return Compiled(variant.name, int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0]), spilled, text)


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack and local memory, by the ``cuobjdump`` that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
