"""Ending a run in good order when it is told to, as schedulers do before they kill it."""

from __future__ import annotations

import logging
import signal

import ignite.distributed as idist
from ignite.engine import Engine, Events
from scripts.training.checkpoints import CheckpointHandler
from scripts.utils.devices import runs_ahead

__all__ = ["Preemption"]

logger = logging.getLogger(__name__)


class Preemption:
    """At SIGTERM, SIGUSR1 or Ctrl-C: end the running update, save a checkpoint, stop training.

    The signal may reach any of several processes; all stop after the same update. One that comes while an epoch is
    validated counts after that.

    Args:
        checkpoint: what saves the checkpoint.
    """

    def __init__(self, checkpoint: CheckpointHandler) -> None:
        self.checkpoint = checkpoint

    def attach(self, engine: Engine) -> None:
        """Attach last, so that everything else of an update or an epoch is done."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_batch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop_if_told)

    def _after_batch(self, engine: Engine) -> None:
        # the end of an epoch comes with its validation, which belongs to it
        if engine.between_updates and not engine.epoch_ends and self._may_ask(engine):
            self._stop_if_told(engine)

    def _may_ask(self, engine: Engine) -> bool:
        """Processes on GPUs ask each other every ``log_interval`` updates: they would wait for the GPUs each time."""
        alone = idist.get_world_size() == 1 or not runs_ahead(idist.device())
        return alone or engine.state.updates % engine.numbers.log_interval == 0

    def _stop_if_told(self, engine: Engine) -> None:
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
