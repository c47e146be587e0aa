"""Checkpoints: written whole, read safely, enough to go on as if nothing had happened."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn
from torch.utils.data import Dataset

from scripts.files import write_whole
from scripts.networks import VDVAE
from scripts.template import start_from_scans

logger = logging.getLogger(__name__)

LATEST = "checkpoint.pt"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the sentence says which and why."""


def unwrap(network: nn.Module) -> VDVAE:
    """The network itself, where it is wrapped for several processes."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint of a training run, tensors and plain values only.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or not a checkpoint of this bundle.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist: set --ckpt_dir to the run to resume from.")
    checkpoint = _load(path)
    if not isinstance(checkpoint, dict) or not {"network", "average", "optimizer", "epoch"} <= checkpoint.keys():
        raise CheckpointError(f"checkpoint '{path}' was not written by this bundle's training: it cannot be resumed.")
    return checkpoint


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"'{path}' cannot be read ({reason}): it is damaged; use an older one.") from error


def _load_state(network: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"'{path}' is of another architecture than network_def ({_first_difference(state, network.state_dict())}): "
            "use the config that it was trained with, or another file."
        ) from error


def load_weights(network: VDVAE, path: str | os.PathLike) -> VDVAE:
    """The same network with the weights of a ``model.pt``, a state dict.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or of another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights '{path}' do not exist: set --weights (in training) or --ckpt to a model.pt.")
    state = _load(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"weights '{path}' are not a state dict: set --weights to a model.pt.")
    _load_state(network, state, path)
    return network


def start_network(
    network: VDVAE,
    dataset: Dataset,
    seed: int = 0,
    augmented: bool = False,
    weights: str | os.PathLike | None = None,
    resume: bool = False,
) -> VDVAE:
    """A network as training starts with it: from given weights, or from the statistics of the scans.

    Args:
        network: before it is wrapped for several processes.
        dataset: what it will see.
        seed: of the dataset's augmentation.
        augmented: whether the dataset has any.
        weights: a ``model.pt``.
        resume: leave the network alone, since a checkpoint will be loaded.
    """
    if resume:
        return network
    return start_from_scans(network, dataset, seed, augmented) if weights is None else load_weights(network, weights)


class CheckpointHandler:
    """Save everything that a run needs to go on, every ``save_interval`` epochs and at the end.

    ``checkpoint.pt`` is the newest; with ``keep_checkpoints`` each is kept as ``checkpoint_epoch=N.pt`` too.
    ``model.pt`` holds the averaged weights alone, a state dict, of the newest checkpoint, and ``best_model.pt`` those
    of the epoch whose key validation metric was best.

    Args:
        ckpt_dir: made if needed.
        network: the network in training.
        average: the handler that keeps its moving average, with a schedule (``momentum_warmup``).
        validator: the evaluator whose best metric says when to write ``best_model.pt``.
        extras: what else belongs to the run (split, config), written as it is.
        stateful: objects with ``state_dict`` and ``load_state_dict``, by name.
    """

    def __init__(
        self,
        ckpt_dir: str | os.PathLike,
        network: nn.Module,
        average: EMAHandler,
        optimizer: torch.optim.Optimizer,
        save_interval: int = 1,
        keep_checkpoints: bool = False,
        validator: Engine | None = None,
        stateful: dict[str, Any] | None = None,
        extras: dict[str, Any] | None = None,
    ) -> None:
        self.ckpt_dir = Path(ckpt_dir)
        self.network = unwrap(network)
        self.average = average
        self.optimizer = optimizer
        self.save_interval = save_interval
        self.keep_checkpoints = keep_checkpoints
        self.validator = validator
        self.stateful = stateful or {}
        self.extras = extras or {}
        self._best: float | None = None

    def attach(self, engine: Engine) -> None:
        """Attach after validation, so that the metrics of the epoch are known. One process saves for all."""
        if idist.get_rank() > 0:
            return
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save, if this epoch is due or the last."""
        state = engine.state
        self.ckpt_dir.mkdir(parents=True, exist_ok=True)
        best = None if self.validator is None else self.validator.state.best_metric
        if self.validator is not None and self.validator.state.best_metric_epoch == state.epoch:
            self._save(self.average.ema_model.state_dict(), "best_model.pt")
        if state.epoch % self.save_interval and state.epoch != state.max_epochs:
            return
        checkpoint = {
            "network": self.network.state_dict(),
            "average": self.average.ema_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": engine.scaler.state_dict(),
            "epoch": state.epoch,
            "iteration": state.iteration,
            "updates": state.updates,
            "skipped": state.skipped,
            "best_metric": best,
            "best_metric_epoch": None if self.validator is None else self.validator.state.best_metric_epoch,
            "average_updates": self.average.momentum_scheduler.event_index,
            **{name: item.state_dict() for name, item in self.stateful.items()},
            **self.extras,
        }
        path = self._save(checkpoint, LATEST)
        if self.keep_checkpoints:
            self._save(checkpoint, f"checkpoint_epoch={state.epoch}.pt")
        self._save(self.average.ema_model.state_dict(), "model.pt")
        logger.info("Saved '%s'.", path)

    def _save(self, content: dict[str, Any], name: str) -> Path:
        return write_whole(self.ckpt_dir / name, lambda path: torch.save(content, path))

    def resume(self, engine: Engine, restore_optimizer: bool = True) -> None:
        """Go on from ``checkpoint.pt`` in ``ckpt_dir``.

        Args:
            engine: the trainer, before it runs.
            restore_optimizer: False takes the weights alone and starts optimizer, epochs and history anew.

        Raises:
            FileNotFoundError: there is no checkpoint.
            CheckpointError: it is damaged, of another architecture, or has all epochs already.
        """
        path = self.ckpt_dir / LATEST
        checkpoint = load_checkpoint(path)
        state = engine.state
        if restore_optimizer and checkpoint["epoch"] >= state.max_epochs:
            raise CheckpointError(
                f"checkpoint '{path}' has {checkpoint['epoch']} epochs already: set --epochs above that to go on."
            )
        _load_state(self.network, checkpoint["network"], path)
        _load_state(self.average.ema_model, checkpoint["average"], path)
        if not restore_optimizer:
            logger.info("Starting anew from the weights of '%s' (epoch %d).", path, checkpoint["epoch"])
            return
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        engine.scaler.load_state_dict(checkpoint["scaler"])
        for name in ("epoch", "iteration", "updates", "skipped"):
            setattr(state, name, checkpoint[name])
        if self.validator is not None and checkpoint["best_metric"] is not None:
            self.validator.state.best_metric = checkpoint["best_metric"]
            self.validator.state.best_metric_epoch = checkpoint["best_metric_epoch"]
        self.average.momentum_scheduler.event_index = checkpoint["average_updates"]
        for name, item in self.stateful.items():
            item.load_state_dict(checkpoint[name])
        logger.info("Resuming from '%s' after epoch %d, update %d.", path, state.epoch, state.updates)


def _first_difference(saved: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> str:
    """In words, the first tensor of two state dicts that does not match."""
    for name, tensor in own.items():
        if name not in saved:
            return f"it lacks '{name}'"
        if saved[name].shape != tensor.shape:
            return f"'{name}' is {list(saved[name].shape)} there and {list(tensor.shape)} here"
    extra = next(name for name in saved if name not in own)
    return f"it has '{extra}' besides"
