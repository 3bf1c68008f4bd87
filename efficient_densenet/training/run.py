"""Training on Fashion-MNIST with Lightning's ``Trainer``.

The ``Trainer`` does the loop, progress bar, checkpoints, resume, precision and devices. This
module makes a resumed run end with the same weights, bit for bit, as an uninterrupted one: the
order of the images is a function of seed and epoch, the dropout masks of seed and step, and the
checkpoint carries the metrics of the finished epochs.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from efficient_densenet.memory import step as memory
from efficient_densenet.memory.devices import present_device
from efficient_densenet.training import fashion_mnist
from efficient_densenet.training import summary as curves
from efficient_densenet.training.callbacks import BudgetCallback, GraphsCallback, check_graphs
from efficient_densenet.training.config import AUTOCAST, ConfigError, TrainConfig, make_optimizer
from efficient_densenet.training.fashion_mnist import FASHION_MNIST, Manifest
from efficient_densenet.training.folder import RunFolder
from efficient_densenet.training.work import Work

METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
TEST_BATCH = 256


class Classifier(L.LightningModule):
    """A DenseNet in training: SGD, Nesterov momentum 0.9, weight decay 1e-4, the paper's schedule.

    The learning rate is divided by 10 after half and after three quarters of the steps. The network
    itself is :attr:`model`. Source: Huang et al., "Densely Connected Convolutional Networks",
    CVPR 2017, section 4.2.

    Args:
        options: the fields of :class:`TrainConfig`; a checkpoint holds them too, so that
            ``Classifier.load_from_checkpoint(path)`` needs no more.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters(options)
        self.config = TrainConfig(**options)
        self.model = self.config.build_model()
        self.history: list[dict[str, float]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, 10)`` of uint8 images ``(N, 28, 28)``, resized and normalised here."""
        return self.model(self.prepared(images))

    def prepared(self, images: Tensor) -> Tensor:
        """The network's input: float images ``(N, 1, size, size)`` from uint8 ``(N, 28, 28)``."""
        x = images.unsqueeze(1).to(next(self.model.parameters()).dtype) / 255
        size = self.config.image_size
        if x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        return (x - fashion_mnist.MEAN) / fashion_mnist.STD

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = make_optimizer(self.parameters(), lr=self.config.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        milestones = [math.ceil(steps * share) for share in (0.5, 0.75)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        # Lightning's CSV logger starts an empty file: the epochs of the checkpoint go in again.
        for row in self.history:
            self._write(row)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        if batch_idx == 0:
            self._epoch_start = time.perf_counter()
        torch.manual_seed(_step_seed(self.config.seed, self.global_step, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._evaluate("train", batch)

    def on_validation_epoch_start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._epoch_seconds = time.perf_counter() - self._epoch_start

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        batches = int(self.trainer.num_training_batches)
        images = batches * self.config.batch_size * self.trainer.world_size
        row = {
            "epoch": self.current_epoch + 1,
            **{name: metrics[name].item() for name in METRICS},
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": images / self._epoch_seconds,
        }
        self.history.append(row)
        self._write(row)

    def on_save_checkpoint(self, checkpoint: dict[str, list[dict[str, float]]]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, list[dict[str, float]]]) -> None:
        self.history = checkpoint["history"]

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict(
            {f"{split}_loss": loss, f"{split}_accuracy": accuracy},
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            logger=False,
            sync_dist=True,
            batch_size=len(labels),
        )
        return loss

    def _write(self, row: dict[str, float]) -> None:
        logger = self.trainer.loggers[0]
        logger.log_metrics(row, step=int(row["epoch"]))
        logger.save()


class FashionMNISTData(L.LightningDataModule):
    """Fashion-MNIST, divided among the devices.

    Each epoch visits the first ``train_size`` training images in an order that depends on seed and
    epoch alone; an incomplete last batch is dropped. No test image is repeated to make the shares
    equal.

    Args:
        config: batch size, train size and seed.
        data_dir: where to look for the data, or to download them to.
        manifest: the files that are expected.
    """

    def __init__(
        self, config: TrainConfig, data_dir: Path, manifest: Manifest = FASHION_MNIST
    ) -> None:
        super().__init__()
        self.config, self.data_dir, self.manifest = config, data_dir, manifest

    def prepare_data(self) -> None:
        if fashion_mnist.find(self.data_dir, self.manifest) is None:
            fashion_mnist.download(self.data_dir)

    def setup(self, stage: str) -> None:
        """Load the data.

        Raises:
            DataError: if they are missing or damaged.
            ConfigError: if there are fewer images than asked for, or than one step needs.
        """
        data = fashion_mnist.load(self.data_dir, self.manifest)
        available = len(data.train_images)
        size = self.config.train_size or available
        if size > available:
            raise ConfigError("train_size", f"must be at most {available}, got {size}")
        step = self.config.batch_size * self.trainer.world_size  # type: ignore[union-attr]
        if step > size:
            raise ConfigError(
                "batch_size", f"makes a step of {step} images, and there are only {size}"
            )
        self.train_set = TensorDataset(data.train_images[:size], data.train_labels[:size])
        self.test_set = TensorDataset(data.test_images, data.test_labels)

    def train_dataloader(self) -> DataLoader:
        rank, world = self._place()
        sampler: DistributedSampler = DistributedSampler(
            self.train_set, world, rank, shuffle=True, seed=self.config.seed
        )
        return DataLoader(self.train_set, self.config.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        rank, world = self._place()
        # Within a budget, what is tested may need no more than what is trained.
        batch = TEST_BATCH if self.config.budget is None else self.config.batch_size
        sampler = range(rank, len(self.test_set), world)
        return DataLoader(self.test_set, min(batch, TEST_BATCH), sampler=sampler)

    def _place(self) -> tuple[int, int]:
        return self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]


def run(
    config: TrainConfig,
    out: Path,
    data_dir: Path,
    resume: bool = False,
    manifest: Manifest = FASHION_MNIST,
) -> None:
    """Train, evaluate after every epoch, and leave everything in ``out``.

    Args:
        config: what to train.
        out: folder for configuration, metrics, checkpoint, curves and summary.
        data_dir: as for :class:`FashionMNISTData`.
        resume: resume from the checkpoint in ``out``, or start if there is none yet. Of the run's
            options only ``epochs`` may differ, and be more.
        manifest: as for :class:`FashionMNISTData`.

    Raises:
        ConfigError: if ``config`` cannot be trained here, or ``out`` cannot take the run.
        DataError: if the data are missing or damaged.
        torch.OutOfMemoryError: if a step passes the configuration's budget.
    """
    check_graphs(config)
    _quieten()
    L.seed_everything(config.seed, verbose=False)
    classifier = Classifier(**asdict(config))
    data = FashionMNISTData(config, data_dir, manifest)
    folder = RunFolder(out)
    rank_zero_only(folder.open)(config, resume)
    trainer: L.Trainer | None = None
    try:
        trainer = _trainer(config, out)
        ckpt_path = folder.checkpoint if folder.checkpoint.exists() else None
        trainer.fit(classifier, data, ckpt_path=ckpt_path, weights_only=True)
    except BaseException as error:
        if trainer is None or trainer.global_step == 0:
            rank_zero_only(folder.discard)()
        if isinstance(error, SystemExit) and trainer is not None and trainer.interrupted:
            raise KeyboardInterrupt from None  # which Lightning made an exit without a word
        raise
    if trainer.is_global_zero:
        device = trainer.strategy.root_device
        result = curves.summarise(config, classifier.history, *step_memory(config, device), device)
        curves.plot(classifier.history, out / "curves.png")
        curves.write(result, out / "summary.json")
        curves.show(result)


def step_memory(config: TrainConfig, device: torch.device) -> tuple[int, int]:
    """Peak bytes of a training step of ``config``, and of the naive network in the same step.

    Parameters, gradients, optimizer state and the batch are included. The first is measured on
    ``device``; the second is estimated from shapes, without running the step.
    """
    dtype = torch.float64 if config.precision == "64-true" else torch.float32
    shape = (config.batch_size, 1, config.image_size, config.image_size)
    images = torch.randn(shape, device=device, dtype=dtype)
    ours = memory.measure(
        config.build_model().to(device, dtype),
        images,
        target=torch.arange(len(images), device=device) % 10,
        make_optimizer=partial(make_optimizer, lr=config.lr),
        autocast_dtype=AUTOCAST.get(config.precision),
    )
    naive = Work.of(config).estimate("naive", present_device())
    return ours.peak.total, naive.peak.total


def _trainer(config: TrainConfig, out: Path) -> L.Trainer:
    # "warn" would otherwise fill every fresh tensor, which costs time and decides nothing here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    checkpoint = ModelCheckpoint(
        out, filename="last", enable_version_counter=False, save_on_train_epoch_end=True
    )
    callbacks: list[L.Callback] = [checkpoint]
    if config.budget is not None:
        callbacks.append(BudgetCallback(config.budget))
    if config.graphs:
        callbacks.append(GraphsCallback(config))
    try:
        return L.Trainer(
            max_epochs=config.epochs,
            devices=config.devices,
            num_nodes=config.num_nodes,
            precision=config.precision,  # type: ignore[arg-type]
            logger=CSVLogger(out, name="", version=""),
            callbacks=callbacks,
            deterministic="warn",
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            "devices", f"{config.devices} with precision {config.precision}: {reason}"
        ) from error


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A different seed for each step on each device, far from those of neighbouring seeds."""
    return ((seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63


def _quieten() -> None:
    """Silence Lightning's advertisements and the warnings that do not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)
