"""``toolkit gan``: fit, test, sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.cli import Parser
from toolkit.errors import UserError

USAGE = """usage: toolkit gan COMMAND ...

commands:
  fit     train:        toolkit gan fit --config configs/gan/puppets32.yaml
                        (the same with --ckpt_path last continues an interrupted run)
  test    measure:      toolkit gan test --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt
  sample  render clips: toolkit gan sample RUN/checkpoints/last.ckpt OUT

`toolkit gan COMMAND --help` lists the options; `toolkit layers CONFIG` shows the sites that rules can name."""


def fit_or_test(argv: list[str]) -> None:
    """Run LightningCLI with these arguments (``fit ...`` or ``test ...``)."""
    from toolkit.gan.data import GANData
    from toolkit.gan.module import GAN
    from toolkit.gan.samples import Samples
    from toolkit.training import CollapseWatch, History, RunFolder, SaveConfig, ToolkitCLI, quiet

    quiet()

    class GANCLI(ToolkitCLI):
        kind = "gan"

        def add_arguments_to_parser(self, parser: Any) -> None:
            super().add_arguments_to_parser(parser)
            parser.add_lightning_class_args(CollapseWatch, "collapse")
            parser.add_lightning_class_args(Samples, "samples")
            parser.set_defaults(
                {
                    "checkpoint.monitor": "val/frechet",
                    "checkpoint.filename": "best-{step}",
                }
            )

    GANCLI(
        GAN,
        GANData,
        args=argv,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        trainer_defaults={
            "max_steps": 3000,
            "precision": "32-true",
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 500,
            "log_every_n_steps": 50,
            "enable_model_summary": False,
            "callbacks": [History(), RunFolder()],
        },
    )


def sample(argv: list[str]) -> int:
    """``toolkit gan sample``: clips, a grid and, on request, frames with a manifest, from a checkpoint."""
    parser = Parser(
        "toolkit gan sample",
        description="Render looping latent-walk clips (WebM, VP9) and a grid from a GAN's checkpoint.",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="folder for the clips")
    parser.add_argument("--clips", type=int, default=8, help="number of clips (default %(default)s)")
    parser.add_argument("--frames", type=int, default=96, help="frames per clip; the clip loops (default %(default)s)")
    parser.add_argument("--keyframes", type=int, default=6, help="latent vectors that a walk passes (default %(default)s)")
    parser.add_argument("--interpolation", choices=("spline", "slerp"), default="spline", help="(default %(default)s)")
    parser.add_argument("--fps", type=float, default=25.0, help="(default %(default)s)")
    parser.add_argument("--scale", type=int, default=4, help="enlarge the clips this many times (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the walks: the same for every generator (default %(default)s)")
    parser.add_argument(
        "--manifest", action="store_true", help="also write the frames as PNG with a manifest.csv (label fake), ready for a detector"
    )
    args = parser.parse_args(argv)
    for name, least in (("clips", 1), ("frames", 1), ("keyframes", 2), ("scale", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}")

    from rich.progress import track

    from toolkit.console import console
    from toolkit.data.video import write_video
    from toolkit.files import atomic
    from toolkit.gan.module import GAN
    from toolkit.gan.walks import clip_seeds, latent_walk, render
    from toolkit.pictures import enlarge, grid, png, tile_clips

    module = GAN.from_checkpoint(args.checkpoint)
    clips = []
    for place, seed in enumerate(track(clip_seeds(args.clips, args.seed), "rendering clips", console=console, transient=True)):
        walk = latent_walk(seed, args.frames, module.sampler.latent, keyframes=args.keyframes, interpolation=args.interpolation)
        clips.append(render(module.sampler, walk))
        write_video(args.out / f"clip-{place:03d}.webm", (enlarge(f, args.scale) for f in clips[-1]), args.fps)
    write_video(args.out / "all.webm", tile_clips(clips, scale=max(1, args.scale // 2)), args.fps)
    with atomic(args.out / "grid.png") as temporary:
        temporary.write_bytes(png(grid(module.fixed_images(64))))
    if args.manifest:
        from toolkit.data.fakes import write_fakes

        write_fakes(clips, args.out, method=args.checkpoint.stem, name=args.out.name)
    console.print(f"{len(clips)} clip(s), all.webm and grid.png in {args.out}")
    return 0


def main(argv: list[str]) -> int:
    """Entry point of ``toolkit gan``."""
    if argv and argv[0] == "sample":
        return sample(argv[1:])
    if argv and argv[0] in ("fit", "test"):
        fit_or_test(argv)
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    raise UserError(f"toolkit gan: unknown command {argv[0]!r}; the commands are fit, test and sample")
