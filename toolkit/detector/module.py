"""The LightningModule that trains a frame-level fake detector."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from scipy import special
from torch import Tensor, nn

import toolkit
from toolkit.activations.assign import apply_rules
from toolkit.activations.module import ActivationModule
from toolkit.checkpoints import load_module
from toolkit.data.frames import to_float
from toolkit.detector.networks import DetectorNetwork, FrontEnd, Stem, classification_loss
from toolkit.errors import UserError
from toolkit.metrics.detection import Estimate, aggregate, balanced_threshold, fit_temperature, ranking_measures, video_bootstrap
from toolkit.parallel import from_all_processes, synchronise_batch_norm
from toolkit.training import random_state, require_finite, set_random_state, versions

NETWORKS = ("backbone", "head")


class Detector(pl.LightningModule):
    """A frame-level detector: P(fake) for every frame, the mean over its frames for a video.

    At every validation its probabilities are calibrated (one temperature, Guo et al. 2017), and the threshold is chosen
    that has the best balanced accuracy over validation videos; both are saved with the weights.

    Args:
        image_size: side of the frames in pixels.
        backbone: a timm model's name, or spectrum-linear for the linear baseline on the log power spectrum.
        front_end: rgb, residual (neighbouring-pixel residual), or spectrum (with spectrum-linear).
        stem: dense (no stride, no pooling), model (as published), or auto: dense below 96 px.
        weights: file of pretrained weights for the backbone.
        classes: for a softmax head: the classes, real first; filled in from the data.
        activations: network (backbone, head) -> pattern -> activation; without a rule the backbone keeps its own.
            The head has one site, output: sigmoid (real or fake), softmax (real, or which generator), linear (a regression target).
        prefer: providers to take bare names from before the built-in ones.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        seed: of the weights.
    """

    threshold: Tensor
    temperature: Tensor

    def __init__(
        self,
        image_size: int = 64,
        backbone: str = "resnet18",
        front_end: FrontEnd = "rgb",
        stem: Stem = "auto",
        weights: str | None = None,
        classes: list[str] | None = None,
        activations: dict[str, dict[str, str | dict[str, Any]]] | None = None,
        prefer: list[str] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rules = dict(activations or {})
        if unknown := set(rules) - set(NETWORKS):
            raise UserError(f"activations: unknown network {sorted(unknown)[0]!r}; a detector has {' and '.join(NETWORKS)}")
        self.save_hyperparameters()
        self.network: DetectorNetwork | None = None
        self.sites: dict[str, dict[str, str]] = {}
        self.preprocessing: dict[str, Any] = {}
        self.register_buffer("threshold", torch.tensor(0.5))
        self.register_buffer("temperature", torch.tensor(1.0))
        self._outputs: list[dict[str, Tensor]] = []
        self._resume_state: dict[str, Any] | None = None
        self.predictions: pd.DataFrame | None = None
        self.estimates: dict[str, Estimate] = {}
        if classes is not None or not self._is_softmax():
            self.build()

    def _is_softmax(self) -> bool:
        from toolkit.activations.registry import registry
        from toolkit.activations.spec import ActivationSpec

        rule = list((self.options.activations or {}).get("head", {}).values())[-1:] or ["sigmoid"]
        return registry().find(ActivationSpec.parse(rule[0]))[1].name == "softmax"

    def build(self) -> None:
        """Make the network; done as soon as the number of classes is known."""
        h = self.options
        rules = dict(h.activations or {})
        outputs = len(h.classes) if self._is_softmax() else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(h.seed)
            self.network = DetectorNetwork(h.backbone, h.image_size, h.front_end, h.stem, outputs, h.weights)
            image = torch.zeros(2, 3, h.image_size, h.image_size)
            self.sites = {
                "backbone": apply_rules(self.network.backbone, rules.get("backbone", {}), example=image, prefer=h.prefer or ()),
                "head": apply_rules(self.network.head, rules.get("head", {}), prefer=h.prefer or ()),
            }
        self.network.to(memory_format=torch.channels_last)
        self.network.train()
        self.head_kind()

    def head_kind(self) -> str:
        """``sigmoid``, ``softmax`` or ``identity``: what the head's activation makes of the output.

        Raises:
            UserError: the head has another activation, for which there is no loss.
        """
        module = self.net.head["output"]
        kind = module.activation.name if isinstance(module, ActivationModule) else type(module).__name__
        if kind not in ("sigmoid", "softmax", "identity"):
            classification_loss(kind, torch.zeros(1, 1), torch.zeros(1))
        return kind

    @property
    def net(self) -> DetectorNetwork:
        """The network, once built."""
        if self.network is None:
            raise UserError("the detector has a softmax head, so it needs its classes before it can be used")
        return self.network

    def configure_model(self) -> None:
        if self.network is None:
            data = getattr(self.trainer, "datamodule", None)
            self.hparams["classes"] = list(data.classes) if data is not None else ["real", "fake"]
            self.build()

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.configure_model()
        if stage == "fit" and self.trainer.world_size > 1:
            self.network = synchronise_batch_norm(self.net, self.trainer.strategy.root_device)  # type: ignore[assignment]
        if data is not None and stage == "fit":
            self.preprocessing = dict(data.preprocessing)
            if self.head_kind() == "identity" and not data.target:
                raise UserError("a linear head needs a target: --data.target COLUMN names a column of the manifest")

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in [-1, 1] -> ``(N,)`` float32: calibrated P(fake), or the predicted target of a linear head."""
        return self.score(self.net.logits(x))

    def log_odds(self, logits: Tensor) -> Tensor:
        """Log-odds of fake before calibration, ``(N,)``, from the network's ``(N, outputs)``; of a linear head, its output."""
        if self.head_kind() == "softmax":
            return torch.logsumexp(logits[:, 1:], dim=1) - logits[:, 0]
        return logits[:, 0]

    def score(self, logits: Tensor) -> Tensor:
        """What :meth:`forward` returns, from the network's ``(N, outputs)``."""
        odds = self.log_odds(logits)
        if self.head_kind() == "identity":
            return odds
        odds = odds / self.temperature
        return torch.sigmoid(odds) if self.head_kind() == "softmax" else self.net.head["output"](odds[:, None])[:, 0].float()

    @property
    def batches_done(self) -> int:
        """Batches that the training has seen, interrupted runs included."""
        return self.global_step * self.trainer.accumulate_grad_batches

    @property
    def options(self) -> Any:
        """The arguments this was made with, as attributes and as a mapping; saved with every checkpoint."""
        return self.hparams

    def configure_optimizers(self) -> Any:
        h = self.options
        decay = [p for p in self.parameters() if p.dim() > 1]
        plain = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": h.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=h.learning_rate, fused=self.device.type in ("cpu", "cuda"))
        total = max(1, int(self.trainer.estimated_stepping_batches)) if np.isfinite(self.trainer.estimated_stepping_batches) else 10_000
        warmup = min(h.warmup, max(1, total // 5))

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._resume_state is not None:
            set_random_state(self._resume_state)
            self._resume_state = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.net.logits(to_float(batch["image"]))
        loss = self._loss(logits, batch)
        require_finite(self, "loss/train", loss, batch_idx)
        self.log("loss/train", loss, prog_bar=True, batch_size=len(logits))
        return loss

    def _loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        kind = self.head_kind()
        with torch.autocast(self.device.type, enabled=False):
            return classification_loss(kind, logits, batch[{"sigmoid": "fake", "softmax": "method", "identity": "target"}[kind]])

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        logits = self.net.logits(to_float(batch["image"]))
        known = batch["method"] < logits.shape[1] if self.head_kind() == "softmax" else torch.ones_like(batch["fake"], dtype=torch.bool)
        loss = (
            self._loss(logits[known], {k: v[known] for k, v in batch.items() if k != "image"})
            if known.any()
            else logits.new_tensor(float("nan"))
        )
        of_batch = torch.full_like(logits[:, 0], float(loss))
        found = {"log_odds": self.log_odds(logits), "score": self.score(logits), "loss": of_batch}
        self._outputs.append({"item": batch["item"], "fake": batch["fake"], "target": batch["target"], **found})

    def _collected(self, split: str) -> pd.DataFrame:
        """Predictions of a whole split, from all processes, one row per frame."""
        parts = from_all_processes([{key: value.float().cpu().numpy() for key, value in o.items()} for o in self._outputs])
        if not parts:
            return pd.DataFrame()
        table = pd.concat([pd.DataFrame(part) for part in parts]).sort_values("item", ignore_index=True)
        rows = self.trainer.datamodule.part(split).table  # type: ignore[attr-defined]
        about = rows.iloc[table["item"].astype(int)][["video", "label", "method", "index"]].reset_index(drop=True)
        return pd.concat([about, table[["target", "log_odds", "score", "loss"]]], axis=1)

    def on_validation_epoch_start(self) -> None:
        self._outputs = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        table = self._collected("val")
        if table.empty:
            return
        self.log("val/loss", float(table["loss"].mean()), prog_bar=True)
        if self.head_kind() == "identity":
            self.log("val/mae", float((table["score"] - table["target"]).abs().mean()), prog_bar=True)
            return
        fake = (table["label"] == "fake").to_numpy().astype(int)
        odds = table["log_odds"].to_numpy(np.float64)
        if 0 < fake.sum() < len(fake):
            self.temperature.fill_(fit_temperature(fake, odds, table["video"].tolist()))
            videos = aggregate(table["video"].tolist(), fake, special.expit(odds / float(self.temperature)))
            self.threshold.fill_(balanced_threshold(videos["label"].to_numpy(), videos["score"].to_numpy()))
            self.log("val/auc", float(ranking_measures(fake, odds)["auc"][0]), prog_bar=True)
        self._outputs = []

    def on_test_epoch_start(self) -> None:
        self._outputs = []

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        table = self.predictions = self._collected("test")
        self._outputs = []
        if self.head_kind() == "identity":
            error = table["score"] - table["target"]
            self.log_dict({"test/mae": float(error.abs().mean()), "test/rmse": float(np.sqrt((error**2).mean()))})
            return
        self.estimates = summarise(table, float(self.threshold))
        self.log_dict({f"test/{name}": e.value for name, e in self.estimates.items()})

    def probe_networks(self) -> dict[str, tuple[nn.Module, Tensor]]:
        """The network with an input, for finding out where a value stopped being finite."""
        size = self.options.image_size
        return {"detector": (self.net, torch.zeros(2, 3, size, size, device=self.device))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["toolkit"] = {
            "kind": "detector",
            "version": toolkit.__version__,
            "versions": versions(),
            "sites": self.sites,
            "preprocessing": self.preprocessing,
            "threshold": float(self.threshold),
            "calibration": {"method": "temperature", "temperature": float(self.temperature)},
            # Pretrained weights have done their work once there is a checkpoint.
            "options": {**{k: v for k, v in self.options.items() if k != "_instantiator"}, "weights": None},
        }
        state = random_state()
        checkpoint["random_state"] = {"torch": state["torch"]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "random_state" in checkpoint:
            self._resume_state = {**random_state(), "torch": checkpoint["random_state"]["torch"]}

    @classmethod
    def from_checkpoint(cls, path: Path | str, prefer: list[str] | None = None) -> Detector:
        """Load a detector for use, with its threshold and preprocessing.

        Raises:
            UserError: not a detector's checkpoint, or one of another architecture or of unknown activations.
        """
        module, saved = load_module("detector", cls, Path(path), prefer)
        module.preprocessing = saved["preprocessing"]
        return module


def summarise(table: pd.DataFrame, threshold: float, *, resamples: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Frame- and video-level measures of predictions with columns ``video, label, score`` (calibrated P(fake)).

    A column ``group``, if there is one, says which videos were cut from one recording.
    """
    return video_bootstrap(
        table["video"].tolist(),
        (table["label"] == "fake").to_numpy().astype(int),
        table["score"].to_numpy(),
        threshold=threshold,
        groups=table["group"].tolist() if "group" in table else None,
        resamples=resamples,
        seed=seed,
    )
