"""``toolkit detector``: fit, test, robustness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.errors import UserError

USAGE = """usage: toolkit detector COMMAND ...

commands:
  fit   train:    toolkit detector fit --config configs/detector/resnet18.yaml --data.manifests '[REAL, FAKE]'
                  (the same with --ckpt_path last continues an interrupted run)
  test  measure:  toolkit detector test --config RUN/config.yaml --ckpt_path RUN/checkpoints/best.ckpt
  robustness  curves on spoiled frames, Grad-CAM, spectra:  toolkit detector robustness RUN/checkpoints/best.ckpt REAL FAKE

`toolkit detector COMMAND --help` lists the options; `toolkit detect VIDEO --checkpoint CKPT` scores a video file."""


def fit_or_test(argv: list[str]) -> None:
    """Run LightningCLI with these arguments (``fit ...`` or ``test ...``)."""
    from pytorch_lightning.callbacks import EarlyStopping

    from toolkit.detector.data import DetectorData
    from toolkit.detector.module import Detector
    from toolkit.files import atomic
    from toolkit.training import History, RunFolder, SaveConfig, ToolkitCLI, quiet

    quiet()

    class DetectorCLI(ToolkitCLI):
        kind = "detector"

        def add_arguments_to_parser(self, parser: Any) -> None:
            super().add_arguments_to_parser(parser)
            parser.add_lightning_class_args(EarlyStopping, "early_stopping")
            parser.set_defaults(
                {
                    "checkpoint.monitor": "val/loss",
                    "checkpoint.filename": "best",
                    "early_stopping.monitor": "val/loss",
                    "early_stopping.patience": 8,
                    "early_stopping.strict": False,
                }
            )

        def after_test(self) -> None:
            table = self.model.predictions
            if table is not None and self.trainer.is_global_zero:
                path = Path(self.trainer.default_root_dir) / "predictions.csv"
                with atomic(path) as temporary:
                    table.to_csv(temporary, index=False)
                _print_test(self.model)
                print(f"predictions: {path}")

    DetectorCLI(
        Detector,
        DetectorData,
        args=argv,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        trainer_defaults={
            "max_steps": 2000,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 100,
            "log_every_n_steps": 20,
            "enable_model_summary": False,
            "callbacks": [History(), RunFolder()],
        },
    )


def _print_test(model: Any) -> None:
    from toolkit.console import print_rows

    def interval(e: Any) -> str:
        return f"{e.low:.3f} to {e.high:.3f}" if e.low == e.low else "-"

    rows = [(name, f"{e.value:.3f}" if e.value == e.value else "undefined", interval(e), e.n) for name, e in model.estimates.items()]
    if rows:
        print_rows("test", ("measure", "value", "95% interval", "videos"), rows)


def main(argv: list[str]) -> int:
    """Entry point of ``toolkit detector``."""
    if argv and argv[0] in ("fit", "test"):
        fit_or_test(argv)
        return 0
    if argv and argv[0] == "robustness":
        from toolkit.detector import robustness

        return robustness.main(argv[1:])
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    raise UserError(f"toolkit detector: unknown command {argv[0]!r}; the commands are fit, test and robustness")
