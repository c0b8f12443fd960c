"""``toolkit bench``: speed measured as ratios within one run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.cli import Parser
from toolkit.errors import UserError, closest

if TYPE_CHECKING:
    from toolkit.bench.timing import Timing

DEFAULT_ACTIVATIONS = ["relu", "leaky_relu(negative_slope=0.2)", "swish", "gelu", "mish", "snake", "prelu(per_channel=true)"]
DEFAULT_SIZES = {"cuda": ["1MB", "16MB", "64MB", "256MB", "1GB", "odd"], "cpu": ["1MB", "16MB"]}


def _add_ops(commands: argparse._SubParsersAction, name: str, operations: tuple[str, ...], words: str) -> None:
    sub = commands.add_parser(
        name,
        help=words,
        description=f"Time of {words}: eager PyTorch, eager in place, torch.compile and the Triton kernels (with a GPU), on the same "
        "random data in one run; kernel time with the L2 cache emptied (median, 20th and 80th percentile), wall time of calls in a "
        "row, the memory traffic that the operation needs over its time, also as a share of what a plain copy reaches, and peak "
        "memory. Modes: forward (no graph), backward, full (both), second (the gradient of the gradient).",
    )
    sub.add_argument("--activations", nargs="+", default=DEFAULT_ACTIVATIONS, help="as in a config (default: %(default)s)")
    if len(operations) > 1:
        sub.add_argument("--operations", nargs="+", default=list(operations), help="(default: %(default)s)")
    sub.add_argument(
        "--sizes",
        nargs="+",
        help="1MB to 1GB, dcgan64, dcgan128, dcgan256, resnet50 (layer by layer), odd, huge (more than 2^31 elements), or a shape such as "
        "64x256x14x14 (default: 1MB 16MB 64MB 256MB 1GB odd on a GPU, 1MB 16MB on a CPU)",
    )
    sub.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], help="fp32, fp16, bf16 (default: %(default)s)")
    sub.add_argument("--layouts", nargs="+", default=["channels_last"], help="channels_last, nchw (default: %(default)s)")
    sub.add_argument("--modes", nargs="+", default=["forward", "backward", "full", "second"], help="(default: %(default)s)")
    sub.add_argument("--providers", nargs="+", default=["eager", "in place", "compile", "triton"], help="(default: %(default)s)")
    sub.add_argument("--out", type=Path, help="folder for results.csv (Liger-Kernel's columns) and plot.html")
    sub.set_defaults(all_operations=operations)


def _parser() -> Parser:
    parser = Parser("toolkit bench", description="Speed, measured side by side in one run; noise is real, so look at the ratios.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_ops(commands, "activations", ("act",), "activation functions alone")
    fused = ("bias_act", "norm_act", "norm_add_act", "add_act")
    _add_ops(commands, "fused", fused, "activations with a bias, a batch norm, a residual sum before them")
    sub = commands.add_parser(
        "step",
        help="whole training steps",
        description="Images per second of whole training steps. On a CPU of a DCGAN: the plain PyTorch DCGAN example (fp32, NCHW), the "
        "same with one improvement after another, and the toolkit's own training loop with its probes and guards. On a GPU of a DCGAN "
        "and of a ResNet-50 at 224 px: eager, compiled, with the Triton kernels, and these in a CUDA graph, with peak memory.",
    )
    sub.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="image sizes of the DCGAN (default 32 64)")
    sub.add_argument("--widths", type=int, nargs="+", default=[32, 64], help="width for each size (default 32 64)")
    sub.add_argument("--batch-size", type=int, default=64, help="(default %(default)s)")
    sub.add_argument("--rounds", type=int, default=7, help="rounds over all variants (default %(default)s)")
    sub.add_argument("--seconds", type=float, default=3.0, help="per variant and round (default %(default)s)")
    sub.add_argument("--activation", default="swish", help="on a GPU: of the generator and the ResNet (default %(default)s)")
    sub.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default %(default)s)")
    sub.add_argument("--csv", type=Path, help="write the figures to this file")
    detect = commands.add_parser(
        "detect",
        help="`toolkit detect` against decoding alone and the network alone",
        description="Frames per second of `toolkit detect` on a clip, beside decoding alone and the network alone, in turns.",
    )
    detect.add_argument("video", type=Path)
    detect.add_argument("--checkpoint", type=Path, required=True)
    detect.add_argument("--face-model", type=Path)
    detect.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    return parser


def main(argv: list[str]) -> int:
    """``toolkit bench``."""
    args = _parser().parse_args(argv)
    if args.command == "detect":
        from toolkit.bench.detect import run

        run(args)
    elif args.command == "step":
        _step(args)
    else:
        _operations(args)
    return 0


def _known(values: list[str], known: tuple[str, ...], what: str) -> list[str]:
    for value in values:
        if value not in known:
            raise UserError(f"{what} {value!r} is none of {', '.join(known)}.{closest(value, known)}")
    return values


def _operations(args: argparse.Namespace) -> None:
    import csv
    import io

    import torch

    from toolkit import __version__
    from toolkit.bench import ops
    from toolkit.console import console, print_rows
    from toolkit.files import write_text

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = _known(getattr(args, "operations", list(args.all_operations)), args.all_operations, "operation")
    _known(args.dtypes, tuple(ops.DTYPES), "dtype")
    _known(args.layouts, ("channels_last", "nchw"), "layout")
    _known(args.modes, ops.MODES, "mode")
    _known(args.providers, ops.PROVIDERS, "provider")
    names = args.sizes or DEFAULT_SIZES[device.type]
    ops.sizes(names, 4)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}")
    rows = []
    found = ops.measure(chosen, args.activations, names, args.dtypes, args.layouts, args.modes, args.providers, device)
    with console.status("measuring") as status:
        for row in found:
            rows.append(row)
            status.update(f"{len(rows)} measured: {row.operation} {row.activation} {row.size.name} {row.dtype} {row.mode} {row.provider}")
    print_rows(f"{args.command} on {name}", ops.HEADINGS, ops.table(rows))
    if device.type == "cpu":
        ran = any(row.provider == "triton" for row in rows)
        kernels = "Triton's kernels ran in its interpreter, whose times mean nothing" if ran else "no Triton kernels"
        print(f"without a GPU: {kernels}, wall time throughout, no memory figures")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, ops.COLUMNS)
        writer.writeheader()
        writer.writerows(ops.records(rows, name, __version__))
        write_text(args.out / "results.csv", text.getvalue())
        write_text(args.out / "plot.html", ops.plot(rows, f"{args.command} on {name}, torch {torch.__version__}"))
        print(f"wrote {args.out / 'results.csv'} and {args.out / 'plot.html'}")


def _step(args: argparse.Namespace) -> None:
    if len(args.sizes) != len(args.widths):
        raise UserError("--sizes and --widths need the same number of values")
    if min(args.rounds, args.batch_size) < 1 or args.seconds <= 0:
        raise UserError("--rounds and --batch-size must be at least 1, --seconds above 0")

    import torch

    from toolkit.bench.cpu_step import dcgan_variants
    from toolkit.bench.timing import alternate
    from toolkit.files import write_text

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU; leave --device cuda out to measure on the CPU")
    gpu = torch.cuda.is_available() and args.device != "cpu"
    where = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, batch {args.batch_size}")
    lines = ["network,image_size,width,precision,variant,images_per_s,p20,p80,ratio,peak_mb"]
    if not gpu:
        for size, width in zip(args.sizes, args.widths, strict=True):
            timings = alternate(dcgan_variants(size, width, args.batch_size), args.batch_size, args.rounds, args.seconds)
            lines += _print_step(f"DCGAN step, {size} px, width {width}", f"dcgan,{size},{width},", timings, {})
    else:
        from toolkit.bench.gpu_step import dcgan_steps, resnet_steps

        device = torch.device("cuda")
        for precision in ("fp32", "bf16"):
            for size, width in zip(args.sizes, args.widths, strict=True):
                steps = list(dcgan_steps(size, width, args.batch_size, precision, args.activation, device))
                timings = alternate([s.variant() for s in steps], args.batch_size, args.rounds, args.seconds)
                title = f"DCGAN step, {size} px, width {width}, {precision}"
                lines += _print_step(title, f"dcgan,{size},{width},{precision}", timings, {s.name: s.peak for s in steps})
                del steps
                torch.cuda.empty_cache()
            steps = list(resnet_steps(args.batch_size, precision, args.activation, device))
            timings = alternate([s.variant() for s in steps], args.batch_size, args.rounds, args.seconds)
            title = f"ResNet-50 step, 224 px, {precision}"
            lines += _print_step(title, f"resnet50,224,,{precision}", timings, {s.name: s.peak for s in steps})
            del steps
            torch.cuda.empty_cache()
    if args.csv:
        write_text(args.csv, "\n".join(lines) + "\n")


def _print_step(title: str, start: str, timings: list[Timing], peaks: dict[str, int]) -> list[str]:
    from toolkit.console import print_rows

    memory = {name: f"{peak / 2**20:.0f}" for name, peak in peaks.items()}
    print_rows(
        title,
        ("variant", "images/s", "20th to 80th percentile", "ratio", *(["peak MB"] if peaks else [])),
        [
            (t.name, f"{t.median:.0f}", f"{t.low:.0f} to {t.high:.0f}", f"{t.ratio:.2f}", *([memory[t.name]] if peaks else []))
            for t in timings
        ],
    )
    return [f"{start},{t.name},{t.median:.1f},{t.low:.1f},{t.high:.1f},{t.ratio:.3f},{memory.get(t.name, '')}" for t in timings]
