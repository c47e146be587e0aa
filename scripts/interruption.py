"""Ending a run in good order when it is told to, as schedulers do before they kill it."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

import ignite.distributed as idist
from ignite.engine import Engine, Events

from scripts.checkpoints import CheckpointHandler

__all__ = ["Interruption", "outlive_signals"]

logger = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
PATIENCE = 60  # seconds


class Interruption:
    """
    At SIGTERM or SIGUSR1: end the running update, save a checkpoint, stop training.

    The signal may reach any of several processes; all stop after the same update. One that comes while an epoch is
    validated counts after that.

    Args:
        checkpoint: what saves the checkpoint.
    """

    def __init__(self, checkpoint: CheckpointHandler) -> None:
        self.checkpoint = checkpoint
        self._signal: int | None = None

    def attach(self, engine: Engine) -> None:
        """Attach last, so that all else of an update or an epoch is done."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_batch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop_if_told)

    def run(self, trainer: Engine) -> None:
        """Run the trainer and heed signals meanwhile, if this is the main thread, which alone gets them in Python."""
        if threading.current_thread() is not threading.main_thread():
            trainer.run()
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            trainer.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _after_batch(self, engine: Engine) -> None:
        # the end of an epoch comes with its validation, which belongs to it
        if engine.between_updates and not engine.epoch_ends:
            self._stop_if_told(engine)

    def _stop_if_told(self, engine: Engine) -> None:
        number = idist.all_reduce(self._signal or 0, op="MAX")
        all_done = engine.epoch_ends and engine.state.epoch == engine.state.max_epochs
        if not number or all_done:
            return
        self.checkpoint.save(engine)
        logger.warning(
            "Stopped by %s after update %d; the checkpoint is saved, go on by --resume True.",
            signal.Signals(int(number)).name,
            engine.state.updates,
        )
        engine.terminate()


def outlive_signals(worker_id: int = 0) -> None:
    """
    Let a data loader's worker go on at the signals that :class:`Interruption` heeds, so that the update can be ended.

    Launchers and schedulers send them to all processes of a job. The training process ends its workers itself; one that
    it has not ended in a minute ends by itself.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: signal.alarm(PATIENCE))
