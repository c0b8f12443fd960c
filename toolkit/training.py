"""What the GAN's and the detector's training share: guards, histories, provenance, and the LightningCLI."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from jsonargparse import ActionConfigFile
from jsonargparse.typing import Path_fr
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from toolkit.activations.assign import site_modules
from toolkit.activations.health import ActivationHealth
from toolkit.checkpoints import AtomicCheckpoints, Checkpoints, load_checkpoint, require_same_weights
from toolkit.console import console
from toolkit.errors import UserError
from toolkit.files import write_json, write_text
from toolkit.plugins import use_files

log = logging.getLogger(__name__)

PACKAGES = ("deepfake-toolkit", "torch", "torchvision", "timm", "pytorch-lightning", "opencv-python", "triton", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def random_state() -> dict[str, Any]:
    """States of the random generators of Python and PyTorch (CPU, and each GPU in use)."""
    # NumPy's global generator is used nowhere: whoever draws from NumPy has a generator of their own.
    state: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


class Diverged(UserError):
    """Training produced a value that is not finite."""


def require_finite(module: Any, name: str, loss: Tensor, batch_idx: int) -> None:
    """Stop the training before it steps on a loss that is not finite, and say where the first such value is.

    On a CPU every batch is looked at; elsewhere every 20th, for a look makes the device wait.

    Args:
        module: a LightningModule with ``probe_networks()``: name -> (network, input).
        name: of the loss.
        loss: a scalar.
        batch_idx: of the batch.

    Raises:
        Diverged: with the step, the first site or weight concerned, and the last good checkpoint.
    """
    if (module.device.type != "cpu" and batch_idx % 20) or bool(torch.isfinite(loss)):
        return
    trainer = module.trainer
    place = next((f" First such value: {where}." for where in non_finite_places(module)), "")
    kept = [
        p for p in (getattr(trainer.checkpoint_callback, "last_model_path", ""), str(good_checkpoint(trainer))) if p and Path(p).is_file()
    ]
    advice = f" The last good checkpoint is {kept[0]}." if kept else " There was no checkpoint yet."
    raise Diverged(
        f"training diverged at step {trainer.global_step}: {name} is not finite.{place}{advice} "
        "A lower learning rate, precision 32-true or another activation may help"
    )


def good_checkpoint(trainer: pl.Trainer) -> Path:
    """Where the last checkpoint goes whose generator had not collapsed."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return Path(folder) / "good.ckpt"


class CollapseWatch(pl.Callback):
    """Notices a generator that has collapsed, and keeps the last checkpoint from before as ``good.ckpt``.

    The module offers ``diversity()``: the mean distance between fakes over that between real images.

    Args:
        every: steps between looks.
        below: diversity that counts as collapsed.
    """

    def __init__(self, every: int = 500, below: float = 0.05) -> None:
        self.every, self.below = every, below
        self.collapsed_at: int | None = None
        self._last_look = 0

    def state_dict(self) -> dict[str, Any]:
        return {"collapsed_at": self.collapsed_at, "last_look": self._last_look}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.collapsed_at, self._last_look = state_dict["collapsed_at"], state_dict["last_look"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step - self._last_look < self.every:
            return
        self._last_look = step
        diversity = pl_module.diversity()
        if diversity >= self.below:
            if trainer.checkpoint_callback is not None:
                trainer.save_checkpoint(good_checkpoint(trainer))
        elif self.collapsed_at is None:
            self.collapsed_at = step
            path = good_checkpoint(trainer)
            kept = f" The last checkpoint from before is {path}." if path.is_file() else ""
            print(
                f"\nwarning: the generator has collapsed by step {step}: its images differ {diversity:.1%} as much as real ones.{kept}",
                file=sys.stderr,
            )


@torch.no_grad()
def non_finite_places(pl_module: Any) -> list[str]:
    """Sites (in order of computation) and then weights of a module's networks that hold a NaN or an infinity."""
    places: list[str] = []
    weights: list[str] = []
    for network_name, (network, example) in pl_module.probe_networks().items():
        handles = []
        for site, module in site_modules(network).items():

            def hook(m: nn.Module, args: Any, output: Tensor, where: str = f"site {site} of the {network_name}") -> None:
                if not bool(torch.isfinite(output).all()):
                    places.append(where)

            handles.append(module.register_forward_hook(hook))
        try:
            network(example)
        finally:
            for handle in handles:
                handle.remove()
        weights += [f"weight {n} of the {network_name}" for n, p in network.named_parameters() if not bool(torch.isfinite(p).all())]
    return places + weights


class History(pl.Callback):
    """Keeps what was logged as rows ``(step, name, value)``, in the checkpoint too: a resumed run has one history.

    Args:
        prefixes: names to keep start with one of these.
    """

    def __init__(self, prefixes: tuple[str, ...] = ("val/", "loss/")) -> None:
        self.prefixes = prefixes
        self.rows: list[tuple[int, str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [(int(s), str(n), float(v)) for s, n, v in state_dict["rows"]]

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Add one row per value; a name that was recorded at this step already is left alone."""
        present = {(s, n) for s, n, _ in self.rows[-200:]}
        for name, value in values.items():
            if name.startswith(self.prefixes) and (step, name) not in present:
                self.rows.append((step, name, float(value)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self.add(trainer.global_step, {k: v for k, v in trainer.callback_metrics.items() if k.startswith("loss/")})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.add(trainer.global_step, {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


class StepBar(pl.callbacks.ProgressBar):
    """A progress bar over the whole training: step, speed, time left, and the logged figures."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def disable(self) -> None:
        self._stop()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else None
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=console, disable=not trainer.is_global_zero)
        self._task = self._bar.add_task("", total=total, completed=trainer.global_step)
        self._bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is not None and self._task is not None:
            figures = "  ".join(f"{k.split('/')[-1]} {float(v):.3g}" for k, v in trainer.progress_bar_metrics.items())
            self._bar.update(self._task, completed=trainer.global_step, description=figures)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def quiet() -> None:
    """Silence warnings that do not concern the toolkit's users, each for a reason."""
    for message in (
        "LightningCLI's args parameter",  # it is meant to be called from within `toolkit`
        ".*does not have many workers",  # frames are mapped into memory: workers only cost time
        ".*module.s. in eval mode at the start of training",  # the averaged generator is
        ".*your dataloader is not resumable",  # its sampler is, see Batches.start_at
        ".*no pre-optimization state was saved",  # a checkpoint is meant to hold the state after the step
        ".*is not supported by the model summary",
        ".*treespec, LeafSpec",
        "You defined a `validation_step` but have no",  # nothing to validate on is the user's choice
        ".*smaller than the logging interval",  # what is logged is kept by History and RunFolder too
        ".*Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Lightning's tips and device tables; its warnings and errors still come through.
    for name in (
        "pytorch_lightning.utilities.rank_zero",
        "pytorch_lightning.trainer.connectors.checkpoint_connector",
        "lightning_fabric.utilities.seed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)


class OneLineErrors(LightningArgumentParser):
    """A parser that answers a mistake with one line and takes no abbreviated options."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **{**keywords, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse nests one line per level of the config; the innermost ones say what is wrong.
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        text = str(cause) if cause is not None else " ".join(part.strip() for part in message.splitlines() if part.strip())
        raise UserError(f"{text[:700]} (see --help)")


class ToolkitCLI(LightningCLI):
    """LightningCLI with one-line errors, that keeps everything of a run in one folder, ``--out``."""

    kind = "run"

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        given = {"model", "dataloaders", "datamodule"}
        return {"fit": given | {"train_dataloaders", "val_dataloaders"}, "test": given}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"deepfake-toolkit, pytorch-lightning {pl.__version__}"])
        parser = OneLineErrors(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with options; may be repeated")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=str, default="", help="the run's folder (default: runs/KIND/NAME OF THE CONFIG)")
        parser.add_argument("--plugins", type=list[Path_fr], default=[], help="one-file plugins; paths in a config start from its folder")
        parser.link_arguments("model.image_size", "data.image_size")
        for seeded in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", seeded, compute_fn=_as_seed)
        parser.add_lightning_class_args(ActivationHealth, "health")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults({"checkpoint.mode": "min", "checkpoint.auto_insert_metric_name": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise UserError(f"a config is not a text file ({error.reason} at byte {error.start}); it must be YAML") from error

    def _parse_ckpt_path(self) -> None:
        """Lightning would put the checkpoint's options in place of the given ones without a word: here they must agree."""

    def before_fit(self) -> None:
        self._check_checkpoint()

    def before_test(self) -> None:
        self._check_checkpoint()

    def _check_checkpoint(self) -> None:
        """A checkpoint that does not fit is told before anything else is done."""
        given = self._get(self.config_init, "ckpt_path")
        if not given or given in ("best", "hpc", "registry"):
            return
        path = Path(given)
        if given == "last":
            folder = getattr(self.trainer.checkpoint_callback, "dirpath", None)
            path = Path(folder or ".") / "last.ckpt"
            if folder is None or not path.is_file():
                return  # Lightning starts anew then, and says so
        state = load_checkpoint(path, self.kind)["state_dict"]
        if getattr(self.model, "network", self.model) is not None:  # a detector with classes is built with its data
            require_same_weights(self.model, state, path)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        kwargs["plugins"] = [AtomicCheckpoints()]
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False:
            kwargs["callbacks"] = [*kwargs.get("callbacks", []), StepBar()]
        return super().instantiate_trainer(**kwargs)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        # Absolute from here on: the config that is saved with the run lies in another folder.
        config.plugins = [Path_fr(str(p)) for p in use_files([p.absolute for p in config.plugins], Path())]
        if not config.out:
            named = [Path(str(p)).stem for p in config.get("config") or []]
            config.out = str(Path("runs") / self.kind / (named[-1] if named else "default"))
        # A checkpoint may come from anyone: load tensors and plain values, never code.
        config.weights_only = True
        if not config.trainer.default_root_dir:
            config.trainer.default_root_dir = config.out
        if not config.checkpoint.dirpath:
            config.checkpoint.dirpath = str(Path(config.trainer.default_root_dir) / "checkpoints")


def _as_seed(value: Any) -> int:
    return 0 if value in (True, False, None) else int(value)


class SaveConfig(SaveConfigCallback):
    """Saves the config into the run's folder, also when there is no logger, and again when a run is resumed."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not self.already_saved:
            write_text(Path(trainer.default_root_dir) / "config.yaml", self.parser.dump(self.config, skip_none=False))
            self.already_saved = True


class RunFolder(pl.Callback):
    """Writes ``history.csv`` (and ``health.csv``) into the run's folder at every validation and at the end, and at the
    start ``sites.json``: the activation of every site with its provider."""

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        folder = Path(trainer.default_root_dir)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, History):
                lines = ["step,name,value", *(f"{s},{n},{v!r}" for s, n, v in callback.rows)]
                write_text(folder / "history.csv", "\n".join(lines) + "\n")
            elif isinstance(callback, ActivationHealth):
                lines = ["step,site,measure,value", *(f"{s},{site},{m},{v!r}" for s, site, m, v in callback.history)]
                write_text(folder / "health.csv", "\n".join(lines) + "\n")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / "sites.json", pl_module.sites)
            for network, sites in pl_module.sites.items():
                for name, activation in sites.items():
                    log.info("%s %s: %s", network, name, activation)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)
