"""How a run goes over its updates: the learning rate, and what the log says of both at the start."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ignite.distributed as idist
from ignite.engine import Events
from scripts.utils.errors import InputError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from scripts.training.trainer import VDVAETrainer

logger = logging.getLogger(__name__)

FEW_SCANS = 300
ENOUGH_UPDATES = 2000  # below, networks of 32³ still get better fast: docs/training.md

UNITS = ((2 * 86400, 86400, "days"), (5400, 3600, "h"), (90, 60, "min"))  # from how many seconds on each is used


def updates_per_epoch(batches: int, accumulation_steps: int = 1) -> int:
    """Updates that as many batches make; the last one of an epoch may have fewer batches."""
    return math.ceil(batches / accumulation_steps)


def learning_rate_factor(warmup: int, decay: float, updates: int) -> Callable[[int, int], float]:
    """The learning rate of each update, as a factor; and of an update of a run that is as many updates further.

    It rises linearly to 1 over the first updates, and falls linearly towards 0 over the last ones.

    Args:
        warmup: number of first updates over which it rises.
        decay: share of all updates, the last ones, over which it falls, 0 to 1.
        updates: of the whole run.

    Raises:
        ValueError: when ``warmup`` is negative or ``decay`` is not a share.
    """
    if warmup < 0:
        raise InputError(f"learning_rate_warmup is {warmup}: it must be 0 or more updates.")
    if not 0 <= decay <= 1:
        raise InputError(
            f"learning_rate_decay is {decay}: it is the share of all updates over which the learning rate falls, from "
            "0 (it stays) to 1."
        )
    falling = round(decay * updates)

    def factor(update: int, ahead: int = 0) -> float:
        rising = min(1.0, (update + 1) / max(1, warmup))
        return min(rising, max(0.0, (updates - update - ahead) / falling)) if falling else rising

    return factor


class LearningRate(LambdaLR):
    """The schedule of :func:`learning_rate_factor`, which ends with the run whatever the batches were before.

    Attributes:
        ahead: by how many updates the run is further than it would be by those that it made, with batches as now.
    """

    def __init__(self, optimizer: Optimizer, warmup: int, decay: float, updates: int) -> None:
        factor = learning_rate_factor(warmup, decay, updates)
        self.ahead = 0
        super().__init__(optimizer, lambda update: factor(update, self.ahead))

    def resume(self, place: int) -> None:
        """Go on with ``base_lrs`` where so many updates lie behind, had all been of batches as now."""
        self.ahead = place - self.last_epoch
        rates = zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True)
        for group, rate, factor in rates:
            group["lr"] = rate * factor(self.last_epoch)


def base_rate(group: dict[str, Any]) -> float:
    """The learning rate of an optimizer's group of parameters, before its schedule."""
    return group.get("initial_lr", group["lr"])


def log_plan(
    trainer: VDVAETrainer, learning_rate_warmup: int, learning_rate_decay: float, from_nothing: bool = True
) -> None:
    """Log, on rank 0, over how many updates a run goes, its schedule, and what would be better.

    Args:
        trainer: before it runs.
        learning_rate_warmup, learning_rate_decay: see :func:`learning_rate_factor`.
        from_nothing: whether the network is not trained yet.
    """
    if idist.get_rank() > 0:
        return
    dataloader, epochs, kl_warmup = trainer.data_loader, trainer.state.max_epochs, trainer.loss_function.kl_warmup
    batch_size = dataloader.batch_size * idist.get_world_size()
    per_epoch = updates_per_epoch(len(dataloader), trainer.accumulation_steps)
    updates = epochs * per_epoch
    scans = len(dataloader.dataset)
    left_out = scans - len(dataloader) * batch_size
    logger.info(
        "%d update(s) per epoch of %d scans each%s, %d in %d epoch(s).",
        *(per_epoch, batch_size * trainer.accumulation_steps),
        f" ({left_out} scan(s) that fill no batch are left out, others in each epoch)" if left_out else "",
        *(updates, epochs),
    )
    sentences = [f"Learning rate {base_rate(trainer.optimizer.param_groups[0]):g}"]
    falling_from = updates - round(learning_rate_decay * updates)
    if learning_rate_warmup > 1:
        sentences[0] += f" from update {learning_rate_warmup} on"
    if learning_rate_warmup > falling_from:
        sentences[0] += ", which this run does not reach: a smaller --learning_rate_warmup lets it learn faster"
    if learning_rate_decay:
        sentences[0] += f", falling to 0 from update {falling_from} on"
    if kl_warmup:
        sentences.append(
            f"the KL divergence counts in full from update {kl_warmup} on: until then the training's bits per dim, in "
            "which it always counts in full, may rise while the network learns"
        )
    logger.info("%s.", "; ".join(sentences))
    if scans < FEW_SCANS and from_nothing:
        logger.info(
            "%d scans are few to begin with nothing: weights that know other brains are worth more than all else then, "
            "see docs/training.md#few-scans (configs/small_cohort.json, or --weights with --renew_template True).",
            scans,
        )
    if updates < ENOUGH_UPDATES and from_nothing:
        logger.info(
            "%d update(s) are few%s; the default network of 32³ takes some %d: --epochs %d makes as many.",
            *(updates, f", and end before the KL warm-up ({kl_warmup})" if updates < kl_warmup else ""),
            *(ENOUGH_UPDATES, math.ceil(ENOUGH_UPDATES / per_epoch)),
        )


class TimeEstimate:
    """Log, on rank 0, how long a run will take, after its first epoch."""

    def __init__(self) -> None:
        self._begun: tuple[float, int] | None = None  # seconds, batches

    def attach(self, engine: VDVAETrainer) -> None:
        """Attach after all that takes time at the end of an epoch: validation, figures, checkpoints."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_STARTED, self._start)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)

    def _start(self, engine: VDVAETrainer) -> None:
        if self._begun is None:
            self._begun = (time.monotonic(), engine.state.iteration)
            self._epoch = engine.state.epoch

    def _after_epoch(self, engine: VDVAETrainer) -> None:
        if engine.state.epoch == self._epoch < engine.state.max_epochs:
            state, (since, batches) = engine.state, self._begun
            seconds = time.monotonic() - since
            left = state.max_epochs * state.epoch_length - state.iteration
            logger.info(
                "Epoch %d took %s, with all that is done at its end: about %s to go.",
                *(self._epoch, duration(seconds), duration(seconds / (state.iteration - batches) * left)),
            )


def duration(seconds: float) -> str:
    """Such as ``45 s``, ``12 min``, ``3.5 h`` or ``4.2 days``."""
    for least, size, unit in UNITS:
        if seconds >= least:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"
