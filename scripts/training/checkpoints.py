"""Checkpoints: written whole, read safely, enough to resume as if nothing had happened."""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from ignite.handlers import EMAHandler
from scripts.networks import VDVAE
from scripts.training.checkpoint_content import (
    REQUIRED,
    architecture_problem,
    checkpoint_problem,
    optimizer_problem,
    state_problem,
)
from scripts.training.schedule import LearningRate, base_rate, updates_per_epoch
from scripts.training.update import make_capturable
from scripts.utils.command_line import check_integer, check_number
from scripts.utils.devices import is_async
from scripts.utils.errors import BundleError, InputError, NotFoundError
from scripts.utils.files import check_archive, remove_leftovers, write_tensors
from torch import nn

if TYPE_CHECKING:
    from monai.engines import Evaluator
    from scripts.training.trainer import VDVAETrainer

logger = logging.getLogger(__name__)

LATEST = "checkpoint.pt"
KEPT = re.compile(r"checkpoint(?:_(\d+))?\.pt")
DAMAGED = "damaged_checkpoint.pt"
DEFAULT_WEIGHTS = "The bundle's own are looked for in models/ under --bundle_root."
STREAK = 5  # skipped updates in a row, which are no longer the fault of a scan or two


class CheckpointError(BundleError, RuntimeError):
    """A checkpoint cannot be used; the sentence says which and why."""


def unwrap(network: nn.Module) -> VDVAE:
    """The network itself, where it is wrapped for several processes."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def newest_checkpoint(ckpt_dir: str | os.PathLike, resume: bool | str) -> Path | None:
    """The newest whole checkpoint of a run to resume from; None for a run that starts.

    What a killed process left half-written is removed, a damaged checkpoint is set aside (``damaged_checkpoint.pt``).

    Args:
        resume: False for None; True; or ``"auto"``: as True where there is a checkpoint, as False where there is none.

    Raises:
        ValueError: ``resume`` is none of the three.
        FileNotFoundError: ``resume`` is True and there is no checkpoint.
        CheckpointError: there are checkpoints, and all are damaged.
    """
    if resume not in (True, False, "auto"):
        raise InputError(f"resume is '{resume}': it must be True, False or auto.")
    folder = Path(ckpt_dir)
    if not resume:
        return None
    remove_leftovers(folder, alone=True)
    # checkpoint.pt is the newest, checkpoint_1.pt the one before, and so on; others are somebody's copies
    paths = sorted((path for path in folder.glob("checkpoint*.pt") if KEPT.fullmatch(path.name)), key=_age)
    damaged = []
    for path in paths:
        try:
            load_checkpoint(path, mmap=True)
        except CheckpointError as error:
            damaged.append(path)
            logger.warning("%s The checkpoint before it is looked at.", error)
            continue
        for other in damaged:
            other.replace(folder / DAMAGED)
        return path
    if paths:
        raise CheckpointError(
            f"All checkpoints in '{folder}' are damaged, the newest is '{paths[0]}': start from its model.pt by "
            "--weights, if that is whole, in another --output_dir."
        )
    if resume == "auto":
        return None
    raise NotFoundError(
        f"checkpoint '{folder / LATEST}' does not exist: set --ckpt_dir to the run to resume from, or --resume auto to "
        "start where there is nothing to resume."
    )


def _age(path: Path) -> int:
    return int(KEPT.fullmatch(path.name)[1] or 0)


def load_checkpoint(path: str | os.PathLike, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of a training run, tensors and plain values only.

    Args:
        mmap: leave the tensors on disk until they are used.

    Raises:
        CheckpointError: it is damaged, or not a checkpoint of this bundle.
    """
    path = Path(path)
    checkpoint = read_archive(path, mmap)
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {*REQUIRED}:
        raise CheckpointError(
            f"checkpoint '{path}' was not written by this bundle's training, or by an earlier version of it: it cannot "
            "be resumed; start from the model.pt beside it by --weights."
        )
    problem = checkpoint_problem(checkpoint)
    if problem is not None:
        raise CheckpointError(f"checkpoint '{path}' cannot be resumed: {problem}.")
    return checkpoint


def read_archive(path: Path, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote, tensors and plain values only; or the tensors of a ``.safetensors``.

    Raises:
        CheckpointError: it is damaged, or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # as few need it

            return load_file(path)
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' holds more than tensors and plain values, and may run code: refused. Save its state dict alone."
        ) from error
    except Exception as error:  # of many kinds, for what is no archive
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"'{path}' cannot be read ({reason}): it is damaged.") from error


def _load_state(network: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        problem = architecture_problem(unwrap(network), state)
        raise CheckpointError(f"'{path}' {problem}, or another file. {DEFAULT_WEIGHTS}") from error


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The state dict in a ``model.pt``, or in a ``.safetensors``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(
            f"weights '{path}' do not exist: set --weights (in training) or --ckpt to a model.pt. {DEFAULT_WEIGHTS}"
        )
    state = read_archive(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"weights '{path}' are not a state dict: set --weights to a model.pt.")
    problem = state_problem(state)
    if problem is not None:
        raise CheckpointError(f"weights '{path}' are not usable: {problem}: take those of another epoch.")
    return state


def load_weights(network: VDVAE, path: str | os.PathLike) -> VDVAE:
    """The same network with the weights of a ``model.pt``, see :func:`read_weights`.

    Raises:
        CheckpointError: they are of another architecture.
    """
    _load_state(network, read_weights(path), path)
    return network


class CheckpointHandler:
    """Save everything that a run needs to resume: as epochs, updates or minutes pass, and at the end.

    ``checkpoint.pt`` is the newest, ``checkpoint_1.pt`` the one before it, and so on; with ``keep_checkpoints`` each
    epoch's is kept as ``checkpoint_epoch=N.pt`` too. ``model.pt`` holds the averaged weights alone, a state dict, of
    the newest checkpoint, and ``best_model.pt`` those of the epoch whose key validation metric was best.

    While updates are skipped in a row nothing is saved as time passes: it would push out what is from better times.

    Args:
        ckpt_dir: made if needed.
        network: the network in training.
        average: the handler that keeps its moving average, with a schedule (``momentum_warmup``).
        save_interval: epochs from one to the next; the last epoch's is saved in any case.
        save_updates: updates from one to the next, also within an epoch. None: epochs alone count.
        save_minutes: minutes from one to the next, likewise.
        keep_last: how many to keep, 1 or more.
        validator: the evaluator whose best metric says when to write ``best_model.pt``.
        datalist: what the run trains and validates on, see :func:`scripts.data.datalist.make_datalist`.
        extras: what else belongs to the run, written as it is.
        stateful: objects with ``state_dict`` and ``load_state_dict``, by name. One that a checkpoint lacks starts anew,
            and what a checkpoint of an earlier version holds besides is left.

    Raises:
        ValueError: a number is too small, or none.
    """

    def __init__(
        self,
        ckpt_dir: str | os.PathLike,
        network: nn.Module,
        average: EMAHandler,
        optimizer: torch.optim.Optimizer,
        save_interval: int = 1,
        save_updates: int | None = None,
        save_minutes: float | None = None,
        keep_last: int = 3,
        keep_checkpoints: bool = False,
        validator: Evaluator | None = None,
        stateful: dict[str, Any] | None = None,
        datalist: dict[str, list[dict]] | None = None,
        extras: dict[str, Any] | None = None,
    ) -> None:
        check_integer("save_interval", save_interval, 1)
        check_integer("keep_last", keep_last, 1)
        if save_updates is not None:
            check_integer("save_updates", save_updates, 1)
        if save_minutes is not None:
            check_number("save_minutes", save_minutes, 0, math.inf)
        self.ckpt_dir = Path(ckpt_dir)
        self.network = unwrap(network)
        self.average = average
        self.optimizer = optimizer
        self.save_interval = save_interval
        self.save_updates = save_updates
        self.save_minutes = save_minutes
        self.keep_last = keep_last
        self.keep_checkpoints = keep_checkpoints
        self.validator = validator
        self.stateful = stateful or {}
        self.datalist = datalist
        self.extras = extras or {}
        self._saved_at = (0, time.monotonic())  # update, seconds

    def attach(self, engine: VDVAETrainer) -> None:
        """Attach after validation, so that the metrics of the epoch are known. One process saves for all."""
        if idist.get_rank() > 0:
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_batch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)

    def _start(self, engine: VDVAETrainer) -> None:
        self.ckpt_dir.mkdir(parents=True, exist_ok=True)
        self._saved_at = (engine.state.updates, time.monotonic())

    def _after_batch(self, engine: VDVAETrainer) -> None:
        if engine.between_updates and not engine.epoch_ends and self._due(engine) and _is_stable(engine):
            self.save(engine)

    def _after_epoch(self, engine: VDVAETrainer) -> None:
        state = engine.state
        if self.validator is not None and self.validator.state.best_metric_epoch == state.epoch:
            write_tensors(self.ckpt_dir / "best_model.pt", self.average.ema_model.state_dict())
        due = state.epoch % self.save_interval == 0 or self._due(engine)
        if state.epoch == state.max_epochs or (due and _is_stable(engine)):
            self.save(engine)

    def _due(self, engine: VDVAETrainer) -> bool:
        update, seconds = self._saved_at
        updates, minutes = engine.state.updates - update, (time.monotonic() - seconds) / 60
        return (self.save_updates is not None and updates >= self.save_updates) or (
            self.save_minutes is not None and minutes >= self.save_minutes
        )

    def save(self, engine: VDVAETrainer) -> None:
        """Save now, between two updates. Only rank 0 does anything."""
        state = engine.state
        if idist.get_rank() > 0 or self._saved_at[0] == state.updates > 0:
            return
        batches = state.iteration % state.epoch_length
        skipped, skipped_in_a_row = engine.numbers.skips()
        checkpoint = {
            "network": self.network.state_dict(),
            "average": self.average.ema_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": engine.scaler.state_dict(),
            "epoch": state.epoch if engine.epoch_ends else state.epoch - 1,
            "scans_into_epoch": 0 if engine.epoch_ends else batches * _scans_per_batch(engine),
            "batches": state.epoch_length,
            "scans_a_batch": _scans_per_batch(engine),
            "updates": state.updates,
            "skipped": skipped,
            "skipped_in_a_row": skipped_in_a_row,
            "kl_warmup": engine.loss_function.kl_warmup,
            "best_metric": None if self.validator is None else self.validator.state.best_metric,
            "best_metric_epoch": None if self.validator is None else self.validator.state.best_metric_epoch,
            "datalist": self.datalist,
            "average_updates": self.average.momentum_scheduler.event_index,
            **{name: item.state_dict() for name, item in self.stateful.items()},
            **self.extras,
        }
        # the weights first: where there is a checkpoint, its weights are there too
        write_tensors(self.ckpt_dir / "model.pt", self.average.ema_model.state_dict())
        path = write_tensors(self.ckpt_dir / LATEST, checkpoint, self._rotate)
        if self.keep_checkpoints and engine.epoch_ends:
            write_tensors(self.ckpt_dir / f"checkpoint_epoch={state.epoch}.pt", checkpoint)
        self._saved_at = (state.updates, time.monotonic())
        logger.info("Saved '%s' after update %d.", path, state.updates)

    def _rotate(self) -> None:
        """checkpoint.pt becomes checkpoint_1.pt, that checkpoint_2.pt, and so on; the oldest goes."""
        names = [LATEST, *(f"checkpoint_{age}.pt" for age in range(1, self.keep_last))]
        for older, newer in reversed(list(zip(names[1:], names, strict=False))):
            if (self.ckpt_dir / newer).exists():
                (self.ckpt_dir / newer).replace(self.ckpt_dir / older)

    def resume(self, engine: VDVAETrainer, path: str | os.PathLike | None, restore_optimizer: bool = True) -> None:
        """Go on from a checkpoint, with the same scans, batch size and number of processes bit for bit.

        With others the epoch is resumed at the batch that holds the first scan that has not been seen in it.

        Args:
            engine: the trainer, before it runs.
            path: as :func:`newest_checkpoint` gives it; None does nothing.
            restore_optimizer: False takes the weights alone and starts optimizer, epochs and history anew.

        Raises:
            CheckpointError: it is damaged, of another architecture, or has trained on what is validated on now.
        """
        if path is None:
            return
        checkpoint = load_checkpoint(path)
        state = engine.state
        _load_state(self.network, checkpoint["network"], path)
        _load_state(self.average.ema_model, checkpoint["average"], path)
        if not restore_optimizer:
            logger.info("Starting anew from the weights of '%s' (epoch %d).", path, checkpoint["epoch"])
            return
        self._check_split(checkpoint, path)
        within_epoch = place_in_epoch(
            checkpoint["scans_into_epoch"], _scans_per_batch(engine), state.epoch_length, engine.accumulation_steps
        )
        rates = [base_rate(group) for group in self.optimizer.param_groups]
        self._load_optimizer(checkpoint, path)
        try:
            self._load_rest(engine, checkpoint)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint '{path}' cannot be resumed ({type(error).__name__}: {error}): start a new run from its "
                "weights by --restore_optimizer False."
            ) from error
        state.iteration = state.epoch * state.epoch_length + within_epoch
        self._set_learning_rates(engine, rates)
        logger.info(
            "Resuming from '%s' after epoch %d%s, update %d.",
            path,
            state.epoch,
            f" and {within_epoch} batches" if within_epoch else "",
            state.updates,
        )
        before = checkpoint.get("batches"), checkpoint.get("scans_a_batch")
        now = state.epoch_length, _scans_per_batch(engine)
        if None not in before and before != now:
            logger.info("An epoch had %d batches of %d scans, and has %d of %d from now on.", *before, *now)

    def _load_optimizer(self, checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            make_capturable(self.optimizer)
            problem = optimizer_problem(self.optimizer)
        # weights of an earlier version may lack a parameter, see FirstLatent
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            problem = str(error)
        if problem is not None:
            raise CheckpointError(
                f"The optimizer of '{path}' has other parameters than this network, or is damaged ({problem}): start a "
                "new run from its weights by --restore_optimizer False."
            )

    def _load_rest(self, engine: VDVAETrainer, checkpoint: dict[str, Any]) -> None:
        """Where the run was, and what has a state of its own."""
        state = engine.state
        if checkpoint.get("scaler"):  # empty of a run that did not scale its loss
            engine.scaler.load_state_dict(checkpoint["scaler"])
        for name in ("epoch", "updates", "skipped", "skipped_in_a_row"):
            setattr(state, name, checkpoint[name])
        # updates are counted on: the warm-up is the one that the run began with
        engine.loss_function.kl_warmup = checkpoint.get("kl_warmup", engine.loss_function.kl_warmup)
        if self.validator is not None and checkpoint.get("best_metric") is not None:
            self.validator.state.best_metric = checkpoint["best_metric"]
            self.validator.state.best_metric_epoch = checkpoint["best_metric_epoch"]
        self.average.momentum_scheduler.event_index = checkpoint["average_updates"]
        for name, item in self.stateful.items():
            if name in checkpoint:
                item.load_state_dict(checkpoint[name])

    def _set_learning_rates(self, engine: VDVAETrainer, rates: list[float]) -> None:
        """Those of this run in the place of a checkpoint's, at the same point of their schedule."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            before = base_rate(group)
            if rate != before:
                group["lr"], group["initial_lr"] = rate * group["lr"] / before if before else rate, rate
                logger.info("The learning rate was %g, and is %g from now on.", before, rate)
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.base_lrs = rates
        if isinstance(engine.lr_scheduler, LearningRate):
            batches, within_epoch = engine.state.epoch_length, engine.state.iteration % engine.state.epoch_length
            per_epoch = updates_per_epoch(batches, engine.accumulation_steps)
            engine.lr_scheduler.resume(engine.state.epoch * per_epoch + within_epoch // engine.accumulation_steps)

    def _check_split(self, checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
        if self.datalist is None or checkpoint.get("datalist") is None:
            return
        trained = {item["subject"] for item in checkpoint["datalist"]["training"]}
        both = sorted(trained.intersection(item["subject"] for item in self.datalist["validation"]))
        if both:
            raise CheckpointError(
                f"The run of '{path}' has trained on {len(both)} subject(s) that would be validated on now, such as "
                f"'{both[0]}': the scans, or how they are split, have changed. Keep its split by --dataset_dir with "
                "the datalist.json of its output_dir, or start a new run from its weights by --restore_optimizer False."
            )


def _is_stable(engine: VDVAETrainer) -> bool:
    return engine.numbers.skips()[1] < STREAK


def _scans_per_batch(engine: VDVAETrainer) -> int:
    """On all processes together."""
    return engine.data_loader.batch_size * idist.get_world_size()


def place_in_epoch(scans: int, scans_per_batch: int, batches: int, accumulation_steps: int = 1) -> int:
    """How many batches of an epoch lie behind a run that has seen so many of its scans.

    Whole updates, none of which holds a scan that has not been seen; at least one is left to do.
    """
    done = min(scans // scans_per_batch, batches - 1)
    return done - done % accumulation_steps


class Preemption:
    """At SIGTERM, SIGUSR1 or Ctrl-C: end the running update, save a checkpoint, stop training.

    The signal may reach any of several processes; all stop after the same update. One that comes while an epoch is
    validated counts after that.

    Args:
        checkpoint: what saves the checkpoint.
    """

    def __init__(self, checkpoint: CheckpointHandler) -> None:
        self.checkpoint = checkpoint

    def attach(self, engine: VDVAETrainer) -> None:
        """Attach last, so that everything else of an update or an epoch is done."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_batch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop_if_told)

    def _after_batch(self, engine: VDVAETrainer) -> None:
        # the end of an epoch comes with its validation, which belongs to it
        if engine.between_updates and not engine.epoch_ends and self._may_ask(engine):
            self._stop_if_told(engine)

    def _may_ask(self, engine: VDVAETrainer) -> bool:
        """Processes on GPUs ask each other every ``log_interval`` updates: they would wait for the GPUs each time."""
        alone = idist.get_world_size() == 1 or not is_async(idist.device())
        return alone or engine.state.updates % engine.numbers.log_interval == 0

    def _stop_if_told(self, engine: VDVAETrainer) -> None:
        number = idist.all_reduce(engine.signals.received, op="MAX")
        all_done = engine.epoch_ends and engine.state.epoch == engine.state.max_epochs
        if not number or all_done:
            return
        engine.numbers.end()
        self.checkpoint.save(engine)
        if idist.get_rank() == 0:
            logger.warning(
                "Stopped by %s after update %d; the checkpoint is saved, resume by --resume True.",
                signal.Signals(int(number)).name,
                engine.state.updates,
            )
        engine.terminate()
